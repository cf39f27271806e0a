"""VFlowOpt's first stage on one image: the least important tokens go, and those of a cell leave one merged token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from vislm.lmm.choosing.ranking import top
from vislm.lmm.interventions import Selection

SMALLEST_WEIGHT = 1e-8
"""Merge weights are at least this, because the importance can be negative when alpha is."""


class TokenGrid(Protocol):
    """A rectangle of an image's tokens; ``vislm.lmm.adapters.llava.Grid`` is one."""

    @property
    def height(self) -> int:
        """Rows."""
        ...

    @property
    def start(self) -> int:
        """Index of its first token in the image's sequence."""
        ...

    @property
    def row_stride(self) -> int:
        """Tokens from one row to the next, the newline token at a row's end included."""
        ...


def stage_counts(tokens: int, in_cells: int, r1: float, a: float) -> tuple[int, int]:
    """Return how many of ``tokens`` = N tokens stage 1 drops and recycles: round(N (1 - R1)) and int(N / a^2).

    Where only ``in_cells`` tokens lie in a cell, so many count for the second number.
    """
    return round(tokens * (1.0 - r1)), int(in_cells / a**2)


def cell_numbers(grids: Sequence[TokenGrid], tokens: int, a: float) -> Tensor:
    """Return the cell (n,) int64 of each of ``tokens`` tokens, -1 outside all grids.

    Within a grid the cell is (floor(row / a), floor(column / a)); a newline token is one more column. Cells of
    different grids (base view, tiles) have different numbers.
    """
    cells = torch.full((tokens,), -1)
    first = 0
    for grid in grids:
        index = torch.arange(min(grid.height * grid.row_stride, tokens - grid.start))
        row = (index // grid.row_stride / a).floor().long()
        column = (index % grid.row_stride / a).floor().long()
        across = int(grid.row_stride / a) + 1
        cells[grid.start : grid.start + len(index)] = first + row * across + column
        first += (int(grid.height / a) + 1) * across
    return cells


def recycle(tokens: Tensor, importance: Tensor, cells: Tensor, drop: int, recycled: int) -> Selection:
    """Drop the ``drop + recycled`` least important tokens, but merge those of each cell into one that stays.

    The merged token is the importance-weighted mean of its members and sits where the most important of them was.
    Of equally important tokens the later ones go first.

    Args:
        tokens: (n, C) features in sequence order.
        importance: (n,), float32.
        cells: (n,) int64, -1 for tokens that are never merged.
        drop: tokens to drop without replacement.
        recycled: further tokens, to be replaced by the merged ones; 0 = plain top-k.
    """
    count = len(tokens)
    high = top(importance, max(1, count - drop - recycled))
    keep = torch.zeros(count, dtype=torch.bool, device=tokens.device)
    keep[high] = True
    low = (~keep & (cells >= 0)).nonzero().flatten()
    if not recycled or not len(low):
        return Selection(keep)
    cell = cells[low].unique(return_inverse=True)[1]
    merged, seats, size = _merge(tokens[low].float(), importance[low], cell)
    keep[low[seats]] = True
    place = keep.cumsum(0) - 1
    source = torch.where(keep, place, -1)
    source[low] = place[low[seats]][cell]
    features = tokens.clone()
    features[low[seats]] = merged.to(tokens)
    sizes = torch.ones(count, device=tokens.device)
    sizes[low[seats]] = size
    return Selection(keep, features[keep], sizes[keep], source)


def _merge(tokens: Tensor, importance: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return per cell the weighted mean (c, C), the index of its most important member (c,) and its members (c,)."""
    number = int(cell.max()) + 1
    weight = importance.float().clamp(min=SMALLEST_WEIGHT).unsqueeze(1)
    zeros = tokens.new_zeros(number, tokens.shape[1])
    weight = weight / zeros[:, :1].index_add(0, cell, weight)[cell]  # 1 for the only member of a cell
    merged = zeros.index_add(0, cell, tokens * weight)
    order = top(importance, len(importance))
    order = order[torch.argsort(cell[order], stable=True)]  # by cell, the most important member first
    size = cell.bincount(minlength=number)
    return merged, order[size.cumsum(0) - size], size.float()


def expected_count(grids: Sequence[TokenGrid], tokens: int, r1: float, a: float) -> int:
    """Return how many of ``tokens`` tokens stage 1 leaves if every cell holds one that goes, while there are any."""
    cells = cell_numbers(grids, tokens, a)
    inside = cells[cells >= 0]
    drop, recycled = stage_counts(tokens, len(inside), r1, a)
    if not drop:
        return tokens
    merged = min(len(inside.unique()), drop + recycled) if recycled else 0
    return max(1, tokens - drop - recycled) + merged


def keep_highest(importance: Tensor, ratio: float) -> Tensor:
    """Return the indices of the tokens that stay when round(n (1 - ratio)) of n are dropped, the least important."""
    return top(importance, keep_count(len(importance), ratio))


def keep_count(tokens: int, ratio: float) -> int:
    """Return n - round(n (1 - ratio)), at least 1, for n ``tokens``."""
    return max(1, tokens - round(tokens * (1.0 - ratio)))
