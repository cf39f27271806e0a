"""A grid pattern along each axis: what every query sees, and which queries see a key.

Along an axis, the members of one dilation group are counted in steps of the dilation ("units"): keys that a query sees
are then neighbours, whatever the pattern.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vislm.kernels.patterns.grid import GridPattern, padded_grid


class Group(NamedTuple):
    """One dilation group of one axis, counted in its own members.

    Attributes:
        row: rows of earlier groups and axes in the table of spans.
        step: the dilation.
        query_start: coordinate of the first query.
        key_start: coordinate of the first key, zero keys around the grid included.
        first: first key that each query sees.
        last: last key that each query sees.
        anchor: where each query stands among the keys.
        earliest: first query that may see each key.
        latest: last query that may see each key.
    """

    row: int
    step: int
    query_start: int
    key_start: int
    first: list[int]
    last: list[int]
    anchor: list[int]
    earliest: list[int]
    latest: list[int]


def axis_groups(pattern: GridPattern) -> list[list[Group]]:
    """Return the dilation groups of three axes; those in front of the grid's hold one query that sees one key."""
    front = [Group(row, 1, 0, 0, [0], [0], [0], [0], [0]) for row in range(3 - len(pattern.grid))]
    axes, row = [[group] for group in front], len(front)
    for axis in range(len(pattern.grid)):
        axes.append([])
        for start in range(pattern.step(axis)):
            axes[-1].append(_group(pattern, axis, start, row))
            row += len(axes[-1][-1].first)
    return axes


def _group(pattern: GridPattern, axis: int, start: int, row: int) -> Group:
    step, margin = pattern.step(axis), pattern.margin[axis]
    position = torch.arange(start, pattern.query_grid[axis], step, device="cpu")
    first, last = (end + margin for end in pattern.span(axis, position))
    empty = first > last
    key_start = (start + margin) % step
    keys = torch.arange(-(-(padded_grid(pattern)[axis] - key_start) // step), device="cpu")
    first = torch.div(first - key_start, step, rounding_mode="floor").masked_fill(empty, len(keys))
    last = torch.div(last - key_start, step, rounding_mode="floor").masked_fill(empty, -1)
    anchor = torch.div(pattern.anchor(axis, position) + margin - key_start, step, rounding_mode="floor")
    # The queries of a key lie between the first that ends at or behind it and the last that starts at or before it.
    earliest = torch.searchsorted(last.cummax(0).values, keys)
    latest = torch.searchsorted(first.flip(0).cummin(0).values.flip(0), keys, right=True) - 1
    lists = (entry.tolist() for entry in (first, last, anchor, earliest, latest))
    return Group(row, step, start, key_start, *lists)
