"""Trying many heads in one forward: the prompt is repeated, and in each row of the batch another head is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislm.heads import act
from vislm.heads.zerotuning import bias_first
from vislm.lmm.adapters import Adapter
from vislm.lmm.decoder.known_keys import follow
from vislm.lmm.interventions import EditStage, EditView, HeadStage, HeadView, PrepareView

Head = tuple[int, int]
"""(layer, head)."""


@dataclass(frozen=True)
class RowHeads:
    """Heads by row of the batch; None: nothing is changed in that row."""

    heads: tuple[Head | None, ...]

    @property
    def layers(self) -> frozenset[int]:
        """Layers that hold one of them."""
        return frozenset(pair[0] for pair in self.heads if pair is not None)

    def listed(self, layer: int) -> list[int]:
        """Return the heads of a layer that are changed in some row, ascending."""
        return sorted({pair[1] for pair in self.heads if pair is not None and pair[0] == layer})

    def own(self, layer: int, device: torch.device) -> Tensor:
        """Return (B, H') bool: which of the listed heads is changed in which row."""
        rows = [[pair == (layer, head) for head in self.listed(layer)] for pair in self.heads]
        return torch.tensor(rows, device=device)


@dataclass(frozen=True)
class Silenced:
    """Sets the output of each row's head to zero, in front of the output projection."""

    rows: RowHeads
    name = "one silenced head per row"

    def plan(self, adapter: Adapter) -> Sequence[HeadStage]:
        """Return one head stage."""
        return [HeadStage(self.rows.layers, self._scale)] if self.rows.layers else []

    def _scale(self, view: HeadView) -> Tensor:
        factors = torch.ones(view.image_output.shape[:2], device=view.image_output.device)
        for row, pair in enumerate(self.rows.heads):
            if pair is not None and pair[0] == view.layer:
                factors[row, pair[1]] = 0.0
        return factors


@dataclass(frozen=True)
class Edited:
    """Edits all rows of each batch row's head."""

    rows: RowHeads
    change: Callable[[EditView], Tensor]
    """Returns weights (B, H', R, K) of the listed heads as if all rows of the batch had all of them."""
    prepare: Callable[[PrepareView], None] | None = None
    name = "one edited head per row"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return one edit stage."""
        if not self.rows.layers:
            return []
        return [EditStage(self.rows.layers, self._edit, "all", self.rows.listed, self.prepare, every_sample=True)]

    def _edit(self, view: EditView) -> Tensor:
        own = self.rows.own(view.layer, view.logits.device)[:, :, None, None]
        return torch.where(own, self.change(view), view.softmax())


def calibrated(rows: RowHeads, beta: float, threshold: float, spare: Literal["first_found", "first_token"]) -> Edited:
    """Return ACT with one head per row."""

    def prepare(view: PrepareView) -> None:
        act.remember_sinks(view, rows.listed(view.layer), threshold, spare)

    def change(view: EditView) -> Tensor:
        weights = view.softmax()
        sinks = follow(view.memory["sinks"][view.layer], weights.shape[0], weights.shape[-1])
        return act.calibrate(weights, sinks, beta)

    return Edited(rows, change, prepare)


def zero_tuned(rows: RowHeads, gamma: float) -> Edited:
    """Return ZeroTuning with one head per row, all with the same factor."""

    def change(view: EditView) -> Tensor:
        factors = torch.full(view.logits.shape[1:2], gamma, device=view.logits.device)
        return view.softmax(bias_first(view.logits, view.keys.first, factors))

    return Edited(rows, change)
