"""Which key tiles a query tile visits, along one axis of a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.kernels.patterns.grid import GridPattern


@dataclass(frozen=True)
class AxisTiles:
    """Counts along one axis of one dilation group; counts of several axes multiply.

    Attributes:
        query_tiles: tiles of queries.
        key_tiles: tiles of keys, cut at multiples of the key tile.
        static: pairs (query tile, key tile) that hold an allowed (query, key), with keys tiled once for all.
        dynamic: the same when the first key tile of every query tile starts at the first key it needs.
        full: pairs of the static tiling in which every query sees every key.
        allowed: pairs (query, key) that attend.
        aligned: the static tiling needs no mask: the queries of every tile share one window, which starts and ends at
            multiples of the key tile.
        whole: the dynamic tiling needs no mask: the queries of every tile share one window of whole key tiles.
    """

    query_tiles: int
    key_tiles: int
    static: int
    dynamic: int
    full: int
    allowed: int
    aligned: bool
    whole: bool


def axis_tiles(pattern: GridPattern, axis: int, query_tile: int, key_tile: int) -> list[AxisTiles]:
    """Return the counts along ``axis``, one entry per dilation group; found by enumeration of all queries.

    A kernel treats the dilation groups as separate sequences, each of which is tiled on its own.
    """
    return [_group_tiles(pattern, axis, group, query_tile, key_tile) for group in range(pattern.step(axis))]


def _group_tiles(pattern: GridPattern, axis: int, group: int, query_tile: int, key_tile: int) -> AxisTiles:
    first, end, size = _windows(pattern, axis, group)
    allowed = int((end - first).sum())
    first, end = _tiled(first, query_tile), _tiled(end, query_tile)
    start, stop = first.amin(1), end.amax(1)
    # the keys that every query of a tile sees; behind the last key there is nothing left to be hidden
    inner_start, inner_stop = first.amax(1), end.amin(1)
    inner_tiles = torch.where(inner_stop == size, _ceil(inner_stop, key_tile), inner_stop // key_tile)
    shared = bool((start == inner_start).all() and (stop == inner_stop).all())
    return AxisTiles(
        query_tiles=len(start),
        key_tiles=-(-size // key_tile),
        static=int((_ceil(stop, key_tile) - start // key_tile).sum()),
        dynamic=int(_ceil(stop - start, key_tile).sum()),
        full=int((inner_tiles - _ceil(inner_start, key_tile)).clamp_min(0).sum()),
        allowed=allowed,
        aligned=shared and not bool((start % key_tile).any() or (stop % key_tile).any()),
        whole=shared and not bool(((stop - start) % key_tile).any()),
    )


def _windows(pattern: GridPattern, axis: int, group: int) -> tuple[Tensor, Tensor, int]:
    """Return the windows ``[first, end)`` of a group's queries, and the group's number of keys, counted in the group.

    Zero keys around the grid are keys as any other: counting starts at the first of them.
    """
    step = pattern.step(axis)
    first, last = pattern.span(axis, torch.arange(group, pattern.query_grid[axis], step))
    first, end = (first - group) // step, (last - group) // step + 1
    before = -min(0, int(first.min()))
    size = max(-(-(pattern.grid[axis] - group) // step), int(end.max()))
    return first + before, end + before, size + before


def _tiled(values: Tensor, tile: int) -> Tensor:
    """Return one row per tile; the last one is filled with copies of the last query."""
    missing = -len(values) % tile
    return torch.cat([values, values[-1:].expand(missing)]).view(-1, tile)


def _ceil(count: Tensor, tile: int) -> Tensor:
    return (count + tile - 1) // tile
