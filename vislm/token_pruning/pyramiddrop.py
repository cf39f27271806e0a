"""PyramidDrop: in stages inside the language model, keep ever fewer of the tokens that the last word attends to.

Source: Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction", CVPR 2025, arXiv 2410.17247; github.com/Cooperx521/PyramidDrop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from vislm.errors import PlanConflict, UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.ranking import last_row, token_counts, top_counts
from vislm.lmm.choosing.schedules import check_layers, ratio_for_average, scaled_layers
from vislm.lmm.choosing.tokens import check_keep
from vislm.lmm.interventions import Alive, LanguageStage, LanguageView, Positions

LAYERS = (8, 16, 24)
"""Tokens are dropped before these layers of 32."""


@dataclass(frozen=True)
class PyramidDrop:
    """Before each layer of ``layers`` keep int(ratio V) of an image's original V tokens.

    score_j = mean over heads of A[h, last prompt token, j], softmaxed over all keys, where A comes from the queries and
    keys that the layer behind the cut would compute (its own norm and projections on the hidden states before it).
    """

    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    """Part of the original visual tokens behind each stage."""
    layers: tuple[int, ...] | None = None
    """Default: before layers 8, 16, 24 of 32, scaled to the model's depth."""
    keep: int | float | None = None
    """Mean number of visual tokens over all decoder layers, or a ratio of them, instead of ``ratios``: the stages then
    keep r, r^2, r^3 of the tokens. None: ``ratios`` (the published ones give 270 of 576 in LLaVA-1.5)."""
    positions: Positions = "contiguous"
    calibrate: bool = False
    """Add RESTORE's logit calibration (``vislm.lmm.decoder.calibration``)."""
    name = "pyramiddrop"

    def plan(self, adapter: Adapter) -> Sequence[LanguageStage]:
        """Return one stage before each of the layers."""
        descending = sorted([1.0, *self.ratios], reverse=True)
        if not self.ratios or min(self.ratios) <= 0 or [1.0, *self.ratios] != descending:
            raise UsageError(f"ratios={self.ratios}: expected descending ratios in (0, 1], one for each stage")
        depth, tokens = len(adapter.layers), adapter.tokens_per_image
        stages = self._stages(depth)
        if self.keep is not None:
            check_keep(self.keep)
            if tokens or isinstance(self.keep, float):
                self._ratios(stages, depth, tokens or 1)  # refuses at once what cannot be had
        return [
            LanguageStage(
                layer,
                layer,
                last_row,
                partial(self._select, number, stages, depth),
                self.positions,
                expected=partial(self._expected, number, stages, depth),
            )
            for number, layer in enumerate(stages)
        ]

    def _stages(self, depth: int) -> dict[int, int]:
        """Return layer -> index of its ratio."""
        if self.layers is not None:
            check_layers(self.name, self.layers, len(self.ratios))
            return {layer: stage for stage, layer in enumerate(self.layers)}
        if len(self.ratios) != len(LAYERS):
            raise UsageError(f"pyramiddrop: {len(self.ratios)} ratios need layers= as well, one for each")
        if depth < 2:
            raise PlanConflict(f"pyramiddrop acts between decoder layers; the model has {depth}")
        return scaled_layers(LAYERS, depth, 1, depth - 1)

    def _ratios(self, stages: dict[int, int], depth: int, tokens: int) -> list[float]:
        """Return the part of an image's tokens that is left behind each stage."""
        if self.keep is None:
            return [self.ratios[stage] for stage in stages.values()]
        share = self.keep if isinstance(self.keep, float) else min(1.0, self.keep / tokens)
        ratio = ratio_for_average(share, list(stages), depth)
        return [ratio ** (number + 1) for number in range(len(stages))]

    def _count(self, number: int, stages: dict[int, int], depth: int, total: int) -> int:
        """Return how many of an image's original tokens are left behind stage ``number``."""
        return max(1, int(self._ratios(stages, depth, total)[number] * total))

    def _expected(self, number: int, stages: dict[int, int], depth: int, alive: Alive) -> int:
        return self._count(number, stages, depth, alive.first)

    def _select(self, number: int, stages: dict[int, int], depth: int, view: LanguageView) -> Tensor:
        tokens = view.memory.setdefault("tokens", token_counts(view.image_of))
        counts = {place: self._count(number, stages, depth, total) for place, total in tokens.items()}
        return top_counts(view.signal, view.image_of, counts)


METHOD = PyramidDrop
