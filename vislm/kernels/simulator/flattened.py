"""The tile count of a kernel that knows nothing of the grid: 1-D tiles over the row-major tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vislm.errors import UsageError
from vislm.kernels.patterns.grid import GridPattern, query_coordinate

_BAND = 1 << 25
"""Entries of the key maps that are held at once."""


@dataclass(frozen=True)
class FlattenedCount:
    """Tile pairs of plain block-sparse attention over the flattened grid, all and visited ones."""

    visited: int
    dense: int

    @property
    def bound(self) -> float:
        """How much faster than dense attention it can be."""
        return self.dense / self.visited


def flattened_count(pattern: GridPattern, query_tile: int, key_tile: int | None = None) -> FlattenedCount:
    """Return the tile pairs that flash attention with a block mask over row-major tokens visits.

    Args:
        pattern: a grid pattern; its prefix tokens are not counted.
        query_tile: queries of a tile: neighbours in row-major order.
        key_tile: keys of a tile; default: as ``query_tile``.

    Raises:
        UsageError: a tile below 1.
    """
    key_tile = query_tile if key_tile is None else key_tile
    if min(query_tile, key_tile) < 1:
        raise UsageError(f"tiles of {query_tile} queries and {key_tile} keys, expected at least 1 of each")
    num_queries, num_keys = math.prod(pattern.query_grid), math.prod(pattern.grid)
    per_band = max(1, _BAND // num_keys // query_tile) * query_tile
    visited = sum(
        _visited(pattern, torch.arange(begin, min(begin + per_band, num_queries)), query_tile, key_tile)
        for begin in range(0, num_queries, per_band)
    )
    return FlattenedCount(visited, -(-num_queries // query_tile) * -(-num_keys // key_tile))


def _visited(pattern: GridPattern, query: Tensor, query_tile: int, key_tile: int) -> int:
    missing = -len(query) % query_tile
    query = torch.cat([query, query[-1:].expand(missing)])
    seen = _axis_mask(pattern, 0, query).unflatten(0, (-1, query_tile))  # (tiles, queries, keys of the axes so far)
    for axis in range(1, len(pattern.grid) - 1):
        along = _axis_mask(pattern, axis, query).unflatten(0, (-1, query_tile))
        seen = (seen[..., None] * along[..., None, :]).flatten(2)
    if len(pattern.grid) > 1:  # a key is seen if any query of the tile sees it along all axes: a product, summed
        along = _axis_mask(pattern, len(pattern.grid) - 1, query).unflatten(0, (-1, query_tile))
        keys = (seen.transpose(1, 2) @ along).flatten(1)
    else:
        keys = seen.sum(1)
    tiles = pad(keys, (0, -keys.shape[1] % key_tile)).unflatten(1, (-1, key_tile))
    return int((tiles > 0).any(-1).sum())


def _axis_mask(pattern: GridPattern, axis: int, query: Tensor) -> Tensor:
    """Return 1 where queries see keys along one axis, else 0: ``(queries, keys along the axis)``, float32."""
    first, last = pattern.span(axis, query_coordinate(pattern, axis, query))
    first, last, key = first[:, None], last[:, None], torch.arange(pattern.grid[axis])[None]
    allowed = (first <= key) & (key <= last) & ((key - first) % pattern.step(axis) == 0)
    return allowed.float()
