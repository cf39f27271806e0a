"""Vertical and horizontal stripes of a map, each a small map of its own.

Source: CSWin (arXiv 2107.00652).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vislm.attention.tokens import crop_grid, pad_grid


class Stripes(NamedTuple):
    """How a map of ``grid`` is cut into stripes of ``size``; the last ones may stick out of it."""

    grid: tuple[int, int]
    size: tuple[int, int]

    @property
    def counts(self) -> tuple[int, int]:
        """Stripes along each axis."""
        rows, columns = (math.ceil(side / size) for side, size in zip(self.grid, self.size, strict=True))
        return rows, columns

    @property
    def padded(self) -> tuple[int, int]:
        """The grid of whole stripes."""
        rows, columns = (count * size for count, size in zip(self.counts, self.size, strict=True))
        return rows, columns

    @property
    def pairs(self) -> int:
        """Pairs of tokens of the map in the same stripe."""
        return math.prod(
            (side // size) * size**2 + (side % size) ** 2 for side, size in zip(self.grid, self.size, strict=True)
        )

    def split(self, x: Tensor) -> Tensor:
        """Return the stripes ``(B S, h w, C)`` of tokens ``(B, H W, C)``, filled up with zeros."""
        (rows, columns), (height, width) = self.counts, self.size
        x = pad_grid(x, self.grid, self.padded).unflatten(1, (rows, height, columns, width))
        return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """Undo :meth:`split`."""
        x = x.unflatten(1, self.size).unflatten(0, (-1, *self.counts)).transpose(2, 3).flatten(1, 4)
        return crop_grid(x, self.padded, self.grid)


def branch_stripes(grid: Sequence[int], split_size: int | None, branch: int) -> Stripes:
    """Return the stripes of a branch: 0 as high as the map, 1 as wide as the map; None = the whole map."""
    rows, columns = grid
    if split_size is None:
        return Stripes((rows, columns), (rows, columns))
    size = (rows, min(split_size, columns)) if branch == 0 else (min(split_size, rows), columns)
    return Stripes((rows, columns), size)
