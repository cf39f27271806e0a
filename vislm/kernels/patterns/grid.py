"""Patterns on a token grid: along each axis, a query sees one evenly spaced range of keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.kernels.shapes import Shape

MAX_AXES = 3


class GridPattern:
    """A pattern over a grid of 1, 2 or 3 axes, flattened row-major (last axis fastest) behind ``prefix`` tokens.

    The keys of a query are the product of one range per axis, ``first, first + step, ..., last``. A subclass is a
    frozen dataclass that defines these ranges by :meth:`span`; masks, tiles and fused kernels all derive from them.
    Prefix tokens (class, register and text tokens) are seen by every query and see every key.

    Attributes:
        grid: number of keys along each axis.
        prefix: number of prefix tokens in front of the grid's keys.
    """

    grid: tuple[int, ...]
    prefix: int

    @property
    def query_grid(self) -> tuple[int, ...]:
        """Number of queries along each axis: one per key."""
        return self.grid

    @property
    def margin(self) -> tuple[int, ...]:
        """Number of zero keys that surround the grid on each side of each axis: none."""
        return (0,) * len(self.grid)

    def span(self, axis: int, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and last key coordinate (inclusive) that queries at ``position`` see along ``axis``."""
        raise NotImplementedError

    def step(self, axis: int) -> int:
        """Return the distance between neighbouring visible keys along ``axis``, the dilation: 1."""
        return 1

    def anchor(self, axis: int, position: Tensor) -> Tensor:
        """Return where queries at ``position`` stand among the keys of ``axis``; relative positions count from it."""
        return position

    def mask(self, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Return the product of the axes' ranges, and True from and to prefix tokens; see :meth:`Pattern.mask`."""
        query, key = query_grid_index(self, query_index), key_index - self.prefix
        allowed = torch.ones_like(query, dtype=torch.bool) & torch.ones_like(key, dtype=torch.bool)
        inside = torch.ones_like(key, dtype=torch.bool)
        for axis, size in enumerate(self.grid):
            position = query_coordinate(self, axis, query)
            first, last = self.span(axis, position)
            coordinate = key_coordinate(self, axis, key)
            inside = inside & (coordinate >= 0) & (coordinate < size)
            allowed = allowed & (first <= coordinate) & (coordinate <= last)
            if self.step(axis) > 1:
                allowed = allowed & ((coordinate - first) % self.step(axis) == 0)
        return torch.where(query < 0, inside, allowed) | (key < 0)

    def fit(self, shape: Shape) -> GridPattern:
        """Return itself after checking that the grid gives the call's numbers of queries and keys."""
        num_queries, num_keys = math.prod(self.query_grid), self.prefix + math.prod(padded_grid(self))
        name = type(self).__name__
        if shape.num_keys != num_keys:
            raise UsageError(
                f"{name} has grid {self.grid} and {self.prefix} prefix tokens, so expects {num_keys} keys, but there "
                f"are {shape.num_keys}; pass the grid of these tokens and prefix=number of class and register tokens"
            )
        if shape.num_queries not in (num_queries, self.prefix + num_queries):
            raise UsageError(
                f"{name} has query grid {self.query_grid} and {self.prefix} prefix tokens, so expects "
                f"{self.prefix + num_queries} queries (or {num_queries} without prefix queries), but there are "
                f"{shape.num_queries}"
            )
        return self


def padded_grid(pattern: GridPattern) -> tuple[int, ...]:
    """Return the number of keys along each axis, with the zero keys around the grid."""
    return tuple(size + 2 * margin for size, margin in zip(pattern.grid, pattern.margin, strict=True))


def query_grid_index(pattern: GridPattern, position: Tensor) -> Tensor:
    """Return the row-major index on the query grid of positions on the key axis; negative for prefix queries."""
    return position - (pattern.prefix + math.prod(padded_grid(pattern)) - math.prod(pattern.query_grid))


def query_coordinate(pattern: GridPattern, axis: int, index: Tensor) -> Tensor:
    """Return the coordinates along ``axis`` of row-major indices on the query grid; 0 for negative indices."""
    return _unravelled(pattern.query_grid, axis, index)


def key_coordinate(pattern: GridPattern, axis: int, index: Tensor) -> Tensor:
    """Return the coordinates along ``axis`` of row-major indices of the grid's keys; those of zero keys lie outside."""
    return _unravelled(padded_grid(pattern), axis, index) - pattern.margin[axis]


def _unravelled(grid: tuple[int, ...], axis: int, index: Tensor) -> Tensor:
    return index.clamp_min(0) // math.prod(grid[axis + 1 :]) % grid[axis]


def checked_grid(name: str, grid: object) -> tuple[int, ...]:
    """Return the grid as a tuple of 1 to 3 positive sizes; a single number is a sequence."""
    sizes = _integers(grid if isinstance(grid, Sequence) else (grid,), least=1)
    if sizes is None or not 1 <= len(sizes) <= MAX_AXES:
        raise UsageError(f"{name} has {grid=}, expected 1 to {MAX_AXES} positive sizes such as (H, W)")
    return sizes


def per_axis(name: str, given: object, grid: tuple[int, ...], least: int) -> tuple[int, ...]:
    """Return one integer of at least ``least`` per axis; a single one is repeated."""
    values = _integers(given if isinstance(given, Sequence) else (given,) * len(grid), least)
    if values is None or len(values) != len(grid):
        raise UsageError(f"{name}={given}, expected an integer >= {least}, or one per axis of the grid {grid}")
    return values


def checked_prefix(prefix: object) -> int:
    """Return the number of prefix tokens; raise ``UsageError`` unless it is a non-negative integer."""
    if not _is_int(prefix) or prefix < 0:
        raise UsageError(f"{prefix=}, expected the number of tokens in front of the grid, 0 or more")
    return prefix


def _integers(given: Sequence[object], least: int) -> tuple[int, ...] | None:
    """Return the entries if all are integers of at least ``least``, else None."""
    integers = tuple(entry for entry in given if _is_int(entry) and entry >= least)
    return integers if len(integers) == len(given) else None


def _is_int(given: object) -> TypeGuard[int]:
    return isinstance(given, int) and not isinstance(given, bool)
