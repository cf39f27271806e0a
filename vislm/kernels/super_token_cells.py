"""The three products between tokens, the 3x3 cells around them, and one weight per pair.

With weights ``w (B, N, 9)``, tokens ``x (B, N, C)``, cells ``s (B, M, C)`` and ``m(n, o)`` the cell at offset ``o`` of
token ``n``, they are the three derivatives of ``sum_no w_no x_n . s_m(n,o)``, so that each one's gradients are the
other two. Cells outside of the map count as zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vislm.kernels.checks import autocasts


class CellGrid(NamedTuple):
    """A map of ``rows x columns`` cells of ``height x width`` tokens each."""

    rows: int
    columns: int
    height: int
    width: int

    def grouped(self, tokens: Tensor) -> Tensor:
        """Return row-major tokens ``(B, N, C)`` by cell, ``(B, M, height * width, C)``."""
        split = tokens.unflatten(1, (self.rows, self.height, self.columns, self.width))
        return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def ungrouped(self, grouped: Tensor) -> Tensor:
        """Undo :meth:`grouped`."""
        split = grouped.unflatten(1, (self.rows, self.columns)).unflatten(3, (self.height, self.width))
        return split.transpose(2, 3).flatten(1, 4)


def products(tokens: Tensor, centres: Tensor, cells: CellGrid) -> Tensor:
    """Return ``x_n . s_m(n,o)``, ``(B, N, 9)``, in float32 or wider."""
    wide = _wide(tokens, centres)
    around = _around(centres.to(wide), cells).transpose(2, 3)
    return cells.ungrouped(_product(cells.grouped(tokens.to(wide)), around))


def spreads(centres: Tensor, weights: Tensor, cells: CellGrid) -> Tensor:
    """Return ``sum_o w_no s_m(n,o)``, ``(B, N, C)``, in float32 or wider."""
    wide = _wide(centres, weights)
    return cells.ungrouped(_product(cells.grouped(weights.to(wide)), _around(centres.to(wide), cells)))


def sums(tokens: Tensor, weights: Tensor, cells: CellGrid) -> Tensor:
    """Return ``sum_no w_no x_n`` over the pairs with ``m(n,o) = m``, ``(B, M, C)``, in float32 or wider."""
    wide = _wide(tokens, weights)
    parts = _product(cells.grouped(weights.to(wide)).transpose(2, 3), cells.grouped(tokens.to(wide)))  # (B, M, 9, C)
    parts = parts.unflatten(1, (cells.rows, cells.columns))
    # What a cell gives to the one at offset (dy, dx) arrives there from (-dy, -dx).
    margin = pad(parts, (0, 0, 0, 0, 1, 1, 1, 1))
    offsets = [(2 - dy, 2 - dx) for dy in range(3) for dx in range(3)]
    arrived = [
        margin[:, top : top + cells.rows, left : left + cells.columns, offset]
        for offset, (top, left) in enumerate(offsets)
    ]
    return torch.stack(arrived).sum(0).flatten(1, 2)


def _around(centres: Tensor, cells: CellGrid) -> Tensor:
    """Return the 3x3 neighbours of each cell, ``(B, M, 9, C)``, zeros outside the map."""
    margin = pad(centres.unflatten(1, (cells.rows, cells.columns)), (0, 0, 1, 1, 1, 1))
    offsets = [(dy, dx) for dy in range(3) for dx in range(3)]
    views = [margin[:, top : top + cells.rows, left : left + cells.columns] for top, left in offsets]
    return torch.stack(views, dim=3).flatten(1, 2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product in the dtype of its factors, whatever ``torch.autocast`` says."""
    if not autocasts(left.device.type):
        return left @ right
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _wide(first: Tensor, second: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
