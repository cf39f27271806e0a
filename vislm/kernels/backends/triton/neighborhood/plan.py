"""Which keys a tile of queries touches, and which queries a tile of keys: the tables that the fused kernels load.

Everything is derived from a pattern's spans, once per pattern, on the host; the kernels know no window rule. Along an
axis, positions are counted in "units": members of one dilation group (see ``neighborhood_axes``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vislm.kernels.backends.triton.neighborhood.axes import Group, axis_groups
from vislm.kernels.patterns.grid import GridPattern, padded_grid

ROW = 16
"""Integers per tile: 3 rows of the span table, 3 query counts, 3 first keys, 3 key counts (in units, axis by axis), the
first query's and the first key's token, 2 unused."""

MIN_BLOCK = 16
"""Smallest side of a matrix product in Triton."""


Triple = tuple[int, int, int]


class TileConfig(NamedTuple):
    """How a kernel is cut: at most ``tokens`` of its own side per program, ``block`` of the other side per step."""

    tokens: int
    block: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of one kernel: ``table`` int32 ``(T, ROW)``, own side padded to ``size`` tokens.

    ``masked`` is False where every query of a tile sees every key of it, so that no window has to be applied; ``steps``
    counts the blocks of the other side that all tiles visit.
    """

    table: Tensor
    size: int
    masked: bool
    steps: int


class Geometry(NamedTuple):
    """What all kernels of a pattern share.

    Attributes:
        axes: number of axes of the grid; all triples have further axes of size 1 in front.
        spans: int32 ``(rows, 4)``: first key, last key and anchor of a query along one axis, in units.
        query_steps: tokens from a query to the next one of its dilation group, per axis.
        key_steps: the same for keys.
    """

    axes: int
    spans: Tensor
    query_steps: Triple
    key_steps: Triple


@lru_cache(maxsize=256)
def geometry(pattern: GridPattern, device: torch.device) -> Geometry:
    """Return what all kernels of a pattern share, on a device."""
    axes = axis_groups(pattern)
    rows = [
        (first, last, anchor, 0)
        for groups in axes
        for group in groups
        for first, last, anchor in zip(group.first, group.last, group.anchor, strict=True)
    ]
    steps = [groups[0].step for groups in axes]
    query_strides, key_strides = _strides(pattern.query_grid), _strides(padded_grid(pattern))
    return Geometry(
        axes=len(pattern.grid),
        spans=torch.tensor(rows, dtype=torch.int32, device="cpu").to(device),
        query_steps=_times(steps, query_strides),
        key_steps=_times(steps, key_strides),
    )


@lru_cache(maxsize=256)
def query_tiles(pattern: GridPattern, config: TileConfig, device: torch.device) -> Tiles:
    """Return the tiles of queries, each with the box of keys that its queries see."""
    return _tiles(pattern, config, device, of_keys=False)


@lru_cache(maxsize=256)
def key_tiles(pattern: GridPattern, config: TileConfig, device: torch.device) -> Tiles:
    """Return the tiles of keys, each with the box of queries that see one of them: the inverse of the window rule."""
    return _tiles(pattern, config, device, of_keys=True)


def _tiles(pattern: GridPattern, config: TileConfig, device: torch.device, *, of_keys: bool) -> Tiles:
    choice, masked = _best(axis_groups(pattern), config, of_keys)
    query_strides, key_strides = _strides(pattern.query_grid), _strides(padded_grid(pattern))
    table = torch.zeros(*(len(rows) for rows in choice.rows), ROW, dtype=torch.int32, device="cpu")
    for axis, rows in enumerate(choice.rows):
        entries = torch.tensor(rows, dtype=torch.int32, device="cpu")
        view = [-1 if axis == other else 1 for other in range(3)]
        for field in range(4):
            table[..., 3 * field + axis] = entries[:, field].view(view)
        table[..., 12] += (entries[:, 4] * query_strides[axis]).view(view)
        table[..., 13] += (entries[:, 5] * key_strides[axis]).view(view)
    size = max(MIN_BLOCK, 1 << (choice.tokens - 1).bit_length())
    return Tiles(table.view(-1, ROW).to(device), size, masked, choice.steps)


_Row = tuple[int, int, int, int, int, int]
"""Along one axis: row of the span table, queries, first key, keys (units), first query's and key's coordinate."""


class _Choice(NamedTuple):
    """One way to cut the grid; ``steps`` as in :class:`Tiles`, ``tokens`` of a whole tile."""

    steps: int
    tokens: int
    rows: list[list[_Row]]


def _best(axes: list[list[Group]], config: TileConfig, of_keys: bool) -> tuple[_Choice, bool]:
    """Return the cut into boxes of at most ``config.tokens`` in the fewest steps, and whether it needs masks."""
    boxes = [
        box
        for box in itertools.product(*(_extents(groups, config.tokens, of_keys) for groups in axes))
        if math.prod(box) <= config.tokens
    ]
    largest = max(math.prod(box) for box in boxes)
    boxes = [box for box in boxes if 4 * math.prod(box) >= largest]
    options = [
        {extent: _cut(groups, extent, of_keys) for extent in sorted({box[axis] for box in boxes})}
        for axis, groups in enumerate(axes)
    ]
    other = 1 if of_keys else 3

    def choice(box: tuple[int, ...]) -> _Choice:
        rows = [option[extent] for option, extent in zip(options, box, strict=True)]
        first, second, third = (torch.tensor([row[other] for row in along], device="cpu") for along in rows)
        tokens = first[:, None, None] * second[:, None] * third
        steps = int(torch.div(tokens + config.block - 1, config.block, rounding_mode="floor").sum())
        return _Choice(steps, math.prod(box), rows)

    def masked(rows: list[list[_Row]]) -> bool:
        return not all(_uniform(groups, row) for groups, along in zip(axes, rows, strict=True) for row in along)

    choices = [choice(box) for box in boxes]
    costs = [found.steps + math.prod(map(len, found.rows)) for found in choices]  # a tile's own overhead: one step
    cheapest = [found for found, cost in zip(choices, costs, strict=True) if cost == min(costs)]
    unmasked = [found for found in cheapest if not masked(found.rows)]
    return (unmasked or cheapest)[0], not unmasked


def _extents(groups: Sequence[Group], tokens: int, of_keys: bool) -> list[int]:
    """Return the sides of a box worth a try along one axis: powers of two, the longest run of equal spans, all."""
    longest = max(len(group.earliest if of_keys else group.first) for group in groups)
    run = max(stop - start for group in groups for start, stop in _runs(*_ranges(group, of_keys)))
    powers = {min(1 << power, longest) for power in range(tokens.bit_length())}
    return sorted(powers | ({run, longest} & set(range(1, tokens + 1))))


def _cut(groups: Sequence[Group], extent: int, of_keys: bool) -> list[_Row]:
    """Return the tiles along one axis, at the borders of runs of equal spans if that is better."""
    other = 1 if of_keys else 3
    cuts = [
        [row for group in groups for row in _rows(group, extent, of_keys, whole_runs)] for whole_runs in (False, True)
    ]
    return min(cuts, key=lambda rows: (sum(row[other] for row in rows), len(rows)))


def _ranges(group: Group, of_keys: bool) -> tuple[list[int], list[int]]:
    return (group.earliest, group.latest) if of_keys else (group.first, group.last)


def _rows(group: Group, extent: int, of_keys: bool, whole_runs: bool) -> list[_Row]:
    """Return the tiles of a group: as many members as fit, or as many whole runs of equal ranges."""
    low, high = _ranges(group, of_keys)
    rows: list[_Row] = []
    start = 0
    for stop in _stops(low, high, extent, whole_runs):
        least, count = min(low[start:stop]), max(high[start:stop]) - min(low[start:stop]) + 1
        other = (least, count) if count > 0 else (0, 0)
        (query, queries), (key, keys) = (other, (start, stop - start)) if of_keys else ((start, stop - start), other)
        query_coordinate, key_coordinate = group.query_start + group.step * query, group.key_start + group.step * key
        rows.append((group.row + query, queries, key, keys, query_coordinate, key_coordinate))
        start = stop
    return rows


def _stops(low: list[int], high: list[int], extent: int, whole_runs: bool) -> list[int]:
    if not whole_runs:
        return [min(start + extent, len(low)) for start in range(0, len(low), extent)]
    stops, start = [], 0
    for begin, end in _runs(low, high):
        if begin > start and end - start > extent:  # this run does not fit behind the ones before it
            stops.append(begin)
            start = begin
        while end - start > extent:  # nor into a tile of its own
            start += extent
            stops.append(start)
    return stops + [len(low)]


def _runs(low: list[int], high: list[int]) -> list[tuple[int, int]]:
    """Return the stretches of equal ranges as (start, stop)."""
    changes = [i for i in range(1, len(low)) if (low[i], high[i]) != (low[i - 1], high[i - 1])]
    return list(zip([0] + changes, changes + [len(low)], strict=True))


def _uniform(groups: Sequence[Group], row: _Row) -> bool:
    """Return whether all queries of a tile see all its keys along this axis."""
    span_row, queries, key, keys = row[:4]
    group = next(group for group in reversed(groups) if group.row <= span_row)
    seen = slice(span_row - group.row, span_row - group.row + queries)
    return queries == 0 or (max(group.first[seen]) <= key and key + keys - 1 <= min(group.last[seen]))


def _strides(grid: Sequence[int]) -> Triple:
    """Return the tokens from one coordinate to the next, for three axes."""
    _, second, third = (1,) * (3 - len(grid)) + tuple(grid)
    return second * third, third, 1


def _times(left: Sequence[int], right: Triple) -> Triple:
    return left[0] * right[0], left[1] * right[1], left[2] * right[2]
