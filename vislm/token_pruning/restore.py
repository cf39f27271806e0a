"""RESTORE: half of the budget chosen by any method, half made by merging the rest, with calibrated attention.

Source: Cho et al., "RESTORE", ICML 2026 (an add-on for reductions before the language model). Written from the paper's
formulas; there is no released code to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vislm.errors import PlanConflict, UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.tokens import check_keep, token_count
from vislm.lmm.interventions import Alive, ImageView, Intervention, Positions, PromptStage, Selection

ROWS = 1024
"""Rows of the correlation matrix that are held at once."""


def anchors(tokens: Tensor, count: int) -> Tensor:
    """Return the ascending indices (count,) of tokens (n, C) that represent many others and are unlike each other.

    With the correlations C of the normalised tokens, R_i = sum_j C_ij and r_i = max of C_ij over the j with R_j > R_i:
    the tokens of largest R_i (1 - r_i). The token of largest R has no superior and is always among them.
    """
    unit = functional.normalize(tokens.float(), dim=-1)
    representative = unit @ unit.sum(0)
    rivals = []
    for start in range(0, len(unit), ROWS):
        own = representative[start : start + ROWS, None]
        correlation = unit[start : start + ROWS] @ unit.T
        rivals.append(correlation.masked_fill(representative[None] <= own, -torch.inf).max(-1).values)
    rival = torch.cat(rivals)
    score = (representative * (1.0 - rival)).masked_fill(rival.isinf(), torch.inf)
    return score.argsort(descending=True, stable=True)[:count].sort().values


def merge_into(tokens: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average every token into its most correlated anchor.

    Args:
        tokens: (n, C).
        anchor: (k,) indices of the anchors.

    Returns:
        means (k, C), sizes (k,) and the anchor's number (n,) of every token.
    """
    unit = functional.normalize(tokens.float(), dim=-1)
    owner = (unit @ unit[anchor].T).argmax(-1)
    owner[anchor] = torch.arange(len(anchor), device=owner.device)
    size = torch.bincount(owner, minlength=len(anchor)).float()
    total = tokens.new_zeros(len(anchor), tokens.shape[1], dtype=torch.float32).index_add_(0, owner, tokens.float())
    return (total / size[:, None]).to(tokens.dtype), size, owner


@dataclass(frozen=True)
class Restore:
    """Let ``base`` choose ``kept`` of the budget; merge all other tokens into the rest of it."""

    keep: int | float = 64
    """Visual tokens per image, or a ratio of them."""
    base: Intervention | None = None
    """Any method that chooses before the language model, e.g. ``DivPrune()``; its ``keep`` is set here. None: merge
    only."""
    kept: float = 0.5
    """Share of the budget that ``base`` chooses."""
    positions: Positions = "original"
    calibrate: bool = True
    """Add the logit calibration (``vislm.lmm.decoder.calibration``)."""
    name = "restore"

    def plan(self, adapter: Adapter) -> Sequence[PromptStage]:
        """Return one stage before the language model."""
        check_keep(self.keep)
        if not 0.0 <= self.kept < 1.0:
            raise UsageError(f"kept={self.kept}: the base method's share must lie in [0, 1)")
        if self.base is None:
            return [PromptStage(partial(self._select, None, adapter), self.positions, expected=self._expected)]
        base: Any = self.base
        if "keep" not in {f.name for f in fields(base)}:
            raise PlanConflict(f"restore cannot set the budget of {base.name}, which has no option keep")
        stages = list(base.plan(adapter))
        if len(stages) != 1 or not isinstance(stages[0], PromptStage):
            raise PlanConflict(
                f"restore needs a base that chooses before the language model; {base.name} acts elsewhere"
            )
        select = partial(self._select, base, adapter)
        return [replace(stages[0], select=select, positions=self.positions, expected=self._expected, assumes=None)]

    def _expected(self, alive: Alive) -> int:
        return token_count(self.keep, alive.candidates)

    def _select(self, base: Any, adapter: Adapter, view: ImageView) -> Selection:
        total = int(view.candidates.sum())
        budget = token_count(self.keep, total)
        if budget == total:
            return Selection(
                view.candidates.clone() if total < len(view.candidates) else torch.ones_like(view.candidates)
            )
        chosen = torch.zeros_like(view.candidates)
        share = round(self.kept * budget)
        if base is not None and share:
            (stage,) = replace(base, keep=share).plan(adapter)
            answer = stage.select(view)
            chosen = (answer.keep if isinstance(answer, Selection) else answer) & view.candidates
        rest = (view.candidates & ~chosen).nonzero().flatten()
        tokens = view.features[rest]
        seats = anchors(tokens, budget - int(chosen.sum()))
        means, size, owner = merge_into(tokens, seats)
        return _assemble(view, chosen, rest, seats, means, size, owner)


def _assemble(
    view: ImageView, chosen: Tensor, rest: Tensor, seats: Tensor, means: Tensor, size: Tensor, owner: Tensor
) -> Selection:
    """Return the selection: chosen tokens as they were, merged ones in their anchors' seats."""
    keep = chosen.clone()
    keep[rest[seats]] = True
    seat_of = keep.cumsum(0) - 1
    features = view.features.clone()
    features[rest[seats]] = means
    sizes = torch.ones(len(keep), device=keep.device)
    sizes[rest[seats]] = size
    source = torch.where(chosen, seat_of, -1)
    source[rest] = seat_of[rest[seats]][owner]
    return Selection(keep, features[keep], sizes[keep], source)


METHOD = Restore
