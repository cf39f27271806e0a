"""The tile model: bounds on the speed-up of a pattern over dense attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vislm.kernels.patterns.grid import GridPattern, padded_grid, per_axis
from vislm.kernels.simulator.tiles import AxisTiles, axis_tiles


@dataclass(frozen=True)
class Speedup:
    """What a pattern costs in tiles, and how much faster than dense attention it can be.

    A kernel computes whole tiles, so a tile pair with one allowed (query, key) costs as much as a full one. The bounds
    count pairs, not time: a kernel that is slower per pair than its dense rival stays below them.

    Attributes:
        dense: tile pairs of dense attention over the same tokens, in one row of tiles.
        pairs: tile pairs of the grid's own tiling (more than ``dense`` where tiles are partly empty).
        static: visited pairs when keys are tiled once for all.
        dynamic: visited pairs when the key tiles of a query tile start at the first key it needs.
        full: pairs of the static tiling that need no mask.
        flop_bound: allowed (query, key) pairs of dense attention over those of the pattern.
        block_sparse: no visited tile of the static tiling needs a mask ("fully block-sparse").
        dynamic_block_sparse: the same for the dynamic tiling.
    """

    dense: int
    pairs: int
    static: int
    dynamic: int
    full: int
    flop_bound: float
    block_sparse: bool
    dynamic_block_sparse: bool

    @property
    def static_bound(self) -> float:
        """The realistic bound ``dense / static``."""
        return self.dense / self.static

    @property
    def dynamic_bound(self) -> float:
        """The realistic bound ``dense / dynamic``."""
        return self.dense / self.dynamic


def simulate(
    pattern: GridPattern, query_tile: int | Sequence[int], key_tile: int | Sequence[int] | None = None
) -> Speedup:
    """Return the tile counts and speed-up bounds of a pattern.

    Args:
        pattern: :class:`Neighborhood`, :class:`Blocked` or :class:`Window`; its prefix tokens are not counted.
        query_tile: queries along each axis of a tile, such as ``(16, 8)``; one number for all axes.
        key_tile: keys along each axis of a tile; default: as ``query_tile``.

    Raises:
        UsageError: a tile that is no positive integer, or not one per axis.

    Source: the tile counting behind GNA (arXiv 2504.16922), defined anew here: the authors' simulator is not released.
    It is an upper bound, exact for fully block-sparse strides and optimistic for stride 1.
    """
    queries, keys = checked_tiles(pattern, query_tile, key_tile)
    per_axis_groups = [axis_tiles(pattern, axis, queries[axis], keys[axis]) for axis in range(len(pattern.grid))]
    return combined(pattern, per_axis_groups, queries, keys)


def checked_tiles(
    pattern: GridPattern, query_tile: int | Sequence[int], key_tile: int | Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the query and the key tile with one extent per axis."""
    queries = per_axis("query_tile", query_tile, pattern.grid, 1)
    return queries, queries if key_tile is None else per_axis("key_tile", key_tile, pattern.grid, 1)


def combined(
    pattern: GridPattern,
    axes: Sequence[Sequence[AxisTiles]],
    query_tile: tuple[int, ...],
    key_tile: tuple[int, ...],
) -> Speedup:
    """Return the bounds from the counts of every axis (its dilation groups).

    A group of the grid is a choice of one group per axis, and its counts are products over the axes; the sum over all
    choices is the product of the sums.
    """
    num_queries, num_keys = math.prod(pattern.query_grid), math.prod(padded_grid(pattern))

    def total(name: str) -> int:
        return math.prod(sum(getattr(group, name) for group in groups) for groups in axes)

    every = [group for groups in axes for group in groups]
    return Speedup(
        dense=-(-num_queries // math.prod(query_tile)) * -(-num_keys // math.prod(key_tile)),
        pairs=math.prod(sum(group.query_tiles * group.key_tiles for group in groups) for groups in axes),
        static=total("static"),
        dynamic=total("dynamic"),
        full=total("full"),
        flop_bound=num_queries * num_keys / total("allowed"),
        block_sparse=all(group.aligned for group in every),
        dynamic_block_sparse=all(group.whole for group in every),
    )
