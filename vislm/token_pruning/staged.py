"""Staged pruning: a tower method thins early, a second one selects behind it, with calibrated attention.

Published comparisons show that tower schedules and diverse or question-aware selections win on different benchmarks and
that calibration adds to both. This method is ours: it puts any two of them and the calibration together under one
budget. Parents: FlowCut (arXiv 2505.19536), DivPrune (2503.02175), CDPruner (2506.10967), RESTORE (ICML 2026).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vislm.errors import PlanConflict, UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.tokens import check_keep, token_count
from vislm.lmm.interventions import Intervention, Positions, PromptStage, Stage, TowerMergeStage, TowerStage


@dataclass(frozen=True)
class Staged:
    """Let ``tower`` keep ``overshoot`` times the budget, and ``selection`` the budget of what is left."""

    keep: int | float = 64
    """Visual tokens per image that reach the language model, or a ratio of them."""
    tower: Intervention | None = None
    """A method that prunes inside the vision tower, e.g. ``FlowCut()``; its ``keep`` is set here. None: none."""
    selection: Intervention | None = None
    """A method that selects before the language model, e.g. ``DivPrune()``; its ``keep`` is set here."""
    overshoot: float = field(default=2.0, metadata={"range": (1.0, 4.0)})
    """Patches that leave the tower, as a multiple of the budget. 1 leaves ``selection`` nothing to do."""
    positions: Positions = "original"
    calibrate: bool = True
    """Add RESTORE's logit calibration (``vislm.lmm.decoder.calibration``)."""
    name = "staged"

    def plan(self, adapter: Adapter) -> Sequence[Stage]:
        """Return the stages of both methods.

        Raises:
            UsageError: neither method is given, or an overshoot below 1.
            PlanConflict: a method that does not act where it should.
        """
        check_keep(self.keep)
        if self.overshoot < 1.0:
            raise UsageError(f"overshoot={self.overshoot}: expected a factor >= 1")
        if self.tower is None and self.selection is None:
            raise UsageError("staged needs a tower method, a selection, or both: tower=flowcut,selection=divprune")
        stages: list[Stage] = []
        keep = self.keep
        if self.tower is not None:
            patches = self._patches(adapter)
            keep = token_count(self.keep, patches)  # the selection sees survivors only: a ratio is of the whole image
            stages += self._tower(adapter, keep, patches)
        if self.selection is not None:
            stages += self._with_budget(self.selection, keep, adapter, PromptStage, "before the language model")
        return stages

    def _patches(self, adapter: Adapter) -> int:
        if adapter.patch_grid is None or adapter.crops_per_image != 1:
            raise PlanConflict(f"staged: the tower of {adapter.family} sees no fixed number of patches per image")
        rows, columns = adapter.patch_grid
        return rows * columns

    def _tower(self, adapter: Adapter, budget: int, patches: int) -> list[Stage]:
        target = min(patches, round(budget * (self.overshoot if self.selection is not None else 1.0)))
        kinds = (TowerStage, TowerMergeStage)
        return self._with_budget(self.tower, target, adapter, kinds, "inside the vision tower")

    def _with_budget(self, method: Any, keep: int | float, adapter: Adapter, kinds: Any, where: str) -> list[Stage]:
        names = {f.name for f in fields(method)}
        if not {"keep", "positions"} <= names:
            raise PlanConflict(f"staged cannot set keep and positions of {method.name}")
        stages = list(replace(method, keep=keep, positions=self.positions).plan(adapter))
        if any(not isinstance(stage, kinds) for stage in stages):
            raise PlanConflict(f"staged: {method.name} does not act only {where}")
        return stages


METHOD = Staged
