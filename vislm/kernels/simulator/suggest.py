"""Windows and strides that turn the savings in FLOPs into time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple, get_args

from vislm.errors import UnknownName, UsageError
from vislm.kernels.patterns.grid import per_axis
from vislm.kernels.patterns.neighborhood import Neighborhood
from vislm.kernels.simulator.model import Speedup, checked_tiles, combined
from vislm.kernels.simulator.tiles import AxisTiles, axis_tiles

Tiling = Literal["static", "dynamic"]
_MAX_COMBINATIONS = 100_000


@dataclass(frozen=True)
class Suggestion:
    """A fully block-sparse neighborhood and its bounds."""

    pattern: Neighborhood
    speedup: Speedup


class _Choice(NamedTuple):
    """A window and stride that need no mask along one axis."""

    window: int
    stride: int
    groups: Sequence[AxisTiles]


def suggest_windows(
    pattern: Neighborhood,
    query_tile: int | Sequence[int],
    key_tile: int | Sequence[int] | None = None,
    *,
    reach: int | Sequence[int] | None = None,
    tiling: Tiling = "static",
) -> list[Suggestion]:
    """Return the fully block-sparse neighborhoods near ``pattern``, with its dilation and causal axes.

    Tried are, along each axis, the windows within ``reach`` of the given one that hold whole key tiles (no others can
    do without a mask), with strides that hold whole query tiles, or equal the window (blocked attention). Each one is
    checked by enumeration, since borders move windows off the key tiles.

    Args:
        pattern: the neighborhood that is wanted; its stride is ignored.
        query_tile: queries along each axis of a tile; one number for all axes.
        key_tile: keys along each axis of a tile; default: as ``query_tile``.
        reach: how far a window may be from the wanted one along each axis; default: one key tile.
        tiling: ``"static"`` if the kernel cuts keys into tiles once for all, ``"dynamic"`` if the key tiles of a query
            tile start at the first key it needs.

    Returns:
        The nearest windows first, the strides of a window by the largest bound, then the smallest stride. Often empty
        for causal axes, on which the queries of a tile never share a window.

    Raises:
        UsageError: tiles or a reach that do not fit the grid, or a reach with too many windows.
        UnknownName: an unknown ``tiling``.
    """
    if tiling not in get_args(Tiling):
        raise UnknownName("tiling", str(tiling), get_args(Tiling))
    queries, keys = checked_tiles(pattern, query_tile, key_tile)
    reaches = keys if reach is None else per_axis("reach", reach, pattern.grid, 0)
    axes = range(len(pattern.grid))
    choices = [list(_choices(pattern, axis, queries[axis], keys[axis], reaches[axis], tiling)) for axis in axes]
    if math.prod(map(len, choices)) > _MAX_COMBINATIONS:
        raise UsageError(f"reach={reaches} finds more than {_MAX_COMBINATIONS} windows and strides; use a smaller one")
    found = []
    for combination in product(*choices):
        near = Neighborhood(
            pattern.grid,
            [choice.window for choice in combination],
            stride=[choice.stride for choice in combination],
            dilation=pattern.dilation,
            causal=pattern.causal,
            border=pattern.border,
            prefix=pattern.prefix,
        )
        found.append(Suggestion(near, combined(near, [choice.groups for choice in combination], queries, keys)))
    return sorted(found, key=lambda suggestion: _order(suggestion, pattern, tiling))


def _choices(
    pattern: Neighborhood, axis: int, query_tile: int, key_tile: int, reach: int, tiling: Tiling
) -> Iterator[_Choice]:
    size, wanted, dilation = pattern.grid[axis], pattern.window[axis], pattern.dilation[axis]
    least, most = max(wanted - reach, 1), min(wanted + reach, size // dilation)
    for window in range(-(-least // key_tile) * key_tile, most + 1, key_tile):
        for stride in sorted({*range(query_tile, window + 1, query_tile), window}):
            line = Neighborhood(
                size, window, stride=stride, dilation=dilation, causal=pattern.causal[axis], border=pattern.border
            )
            groups = axis_tiles(line, 0, query_tile, key_tile)
            if all(group.aligned if tiling == "static" else group.whole for group in groups):
                yield _Choice(window, stride, groups)


def _order(suggestion: Suggestion, wanted: Neighborhood, tiling: Tiling) -> tuple[object, ...]:
    near, speedup = suggestion.pattern, suggestion.speedup
    distance = sum(abs(a - b) for a, b in zip(near.window, wanted.window, strict=True))
    bound = speedup.static_bound if tiling == "static" else speedup.dynamic_bound
    return distance, -speedup.flop_bound, near.window, -bound, near.stride
