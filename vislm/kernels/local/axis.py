"""One axis of a grid pattern, cut into tiles of queries and the ranges of keys that they see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vislm.kernels.patterns.grid import GridPattern


@dataclass(frozen=True, eq=False)
class Axis:
    """The visible keys of every query of one axis, counted so that they are a contiguous range.

    With a dilation d, the positions are taken in the order 0, d, 2d, ..., 1, d + 1, ...: what a query sees is then
    contiguous, and everything below forgets about dilation.

    Attributes:
        order: ``(L,)`` int64, the grid coordinate at each place of that order.
        first: ``(L,)`` first visible key of the query at each place, as a place.
        last: ``(L,)`` last visible key.
        anchor: ``(L,)`` where the query stands among the keys.
        keys: number of keys, with the zero keys around the grid.
    """

    order: Tensor
    first: Tensor
    last: Tensor
    anchor: Tensor
    keys: int


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """An axis cut into ``T`` tiles of ``Q`` queries that see ``S`` keys each.

    Attributes:
        queries: ``(T, Q)`` query coordinates; the last tile repeats its last query where there are too few.
        real: ``(T, Q)`` bool, False for those repetitions.
        keys: ``(T, S)`` key coordinates, counted from the first zero key; repeated where a tile sees fewer.
        kind: ``(T,)`` tiles of the same kind have the same ``allowed`` and ``offset``.
        allowed: ``(kinds, Q, S)`` bool, which query of the tile sees which key.
        offset: ``(kinds, Q, S)`` relative position of key and query in steps; 0 where not allowed.
    """

    queries: Tensor
    real: Tensor
    keys: Tensor
    kind: Tensor
    allowed: Tensor
    offset: Tensor


@lru_cache(maxsize=256)
def axis_of(pattern: GridPattern, axis: int) -> Axis:
    """Return one axis of a pattern."""
    size, step, margin = pattern.query_grid[axis], pattern.step(axis), pattern.margin[axis]
    position = torch.arange(size)
    keys = pattern.grid[axis] + 2 * margin
    if step == 1:
        first, last = pattern.span(axis, position)
        return Axis(position, first + margin, last + margin, pattern.anchor(axis, position) + margin, keys)
    order = (position % step * size + position).argsort()  # by dilation group, then by position
    place = order.argsort()
    first, last = pattern.span(axis, order)
    return Axis(order, place[first], place[last], position, keys)


@lru_cache(maxsize=1024)
def axis_sizes(pattern: GridPattern, axis: int, tile: int) -> tuple[int, int]:
    """Return the number of tiles of ``tile`` queries, and the keys that a tile must hold."""
    first, last = _tile_ranges(axis_of(pattern, axis), tile)
    return len(first), int((last - first).max()) + 1


@lru_cache(maxsize=256)
def axis_tiles(pattern: GridPattern, axis: int, tile: int) -> AxisTiles:
    """Return the axis cut into tiles of ``tile`` queries."""
    line = axis_of(pattern, axis)
    first, last = _tile_ranges(line, tile)
    span = int((last - first).max()) + 1
    slots = torch.arange(len(first) * tile).view(-1, tile)
    query = slots.clamp_max(len(line.order) - 1)
    key = (first.clamp_max(line.keys - span).clamp_min(0))[:, None] + torch.arange(span)
    seen = (line.first[query][..., None] <= key[:, None]) & (key[:, None] <= line.last[query][..., None])
    offset = (key[:, None] - line.anchor[query][..., None]).masked_fill(~seen, 0)
    kinds, kind = torch.unique(torch.stack((seen.long(), offset)).transpose(0, 1), dim=0, return_inverse=True)
    key = key.clamp_max(line.keys - 1)
    reordered = key if pattern.step(axis) == 1 else line.order[key]
    return AxisTiles(line.order[query], slots == query, reordered, kind, kinds[:, 0].bool(), kinds[:, 1])


def _tile_ranges(line: Axis, tile: int) -> tuple[Tensor, Tensor]:
    """Return the first and last key that any query of each tile sees, (T,) each."""
    count = -(-len(line.order) // tile)
    query = torch.arange(count * tile).clamp_max(len(line.order) - 1).view(count, tile)
    return line.first[query].amin(1), line.last[query].amax(1)
