"""The tiles of a whole grid, and the choice of their size."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vislm.kernels.local.axis import AxisTiles, axis_sizes, axis_tiles
from vislm.kernels.patterns.grid import GridPattern, padded_grid

TILE_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 48, 64, 128)
MAX_PAIRS = 1 << 16
"""No tile holds more query-key pairs than this (unless one query alone sees more)."""


@dataclass(frozen=True, eq=False)
class Plan:
    """``T`` tiles of ``Q`` queries that see ``S`` keys each; tensors are on the call's device.

    Attributes:
        queries: ``(T, Q)`` int64, row-major index on the query grid.
        real: ``(T, Q)`` bool, False for repeated queries in incomplete tiles.
        keys: ``(T, P + S)`` int64, index among the call's keys: the P prefix keys, then the tile's keys.
        slot: ``(Nq of the grid,)`` int64, where each query stands in ``queries.flatten()``.
        kind: ``(T,)`` int64.
        allowed: ``(kinds, Q, P + S)`` bool.
        offsets: per axis ``(kinds, Q, S_axis)`` int64, relative position of key and query.
        spans: ``S`` of each axis; their product is ``S``.
        selector: ``(sum of spans, P + S)`` zeros and ones: which keys of a tile have which coordinate in its box, so
            that logits of single axes are spread over a box by one matrix product.
    """

    queries: Tensor
    real: Tensor
    keys: Tensor
    slot: Tensor
    kind: Tensor
    allowed: Tensor
    offsets: tuple[Tensor, ...]
    spans: tuple[int, ...]
    selector: Tensor


@lru_cache(maxsize=64)
def plan_for(pattern: GridPattern, device: torch.device, tile: tuple[int, ...] | None = None) -> Plan:
    """Return the plan of a pattern, with the given queries per tile along each axis or the ones chosen for it."""
    tile = tile or tile_sizes(pattern)
    axes = [axis_tiles(pattern, axis, size) for axis, size in enumerate(tile)]
    queries = _flat([axis.queries for axis in axes], pattern.query_grid)
    real = _product([axis.real for axis in axes])
    keys = _flat([axis.keys for axis in axes], padded_grid(pattern)) + pattern.prefix
    prefix = torch.arange(pattern.prefix).expand(len(keys), -1)
    allowed = _allowed(axes)
    seen = torch.cat((torch.ones(*allowed.shape[:2], pattern.prefix, dtype=torch.bool), allowed), dim=-1)
    slots = torch.empty(math.prod(pattern.query_grid), dtype=torch.long)
    slots[queries[real]] = real.flatten().nonzero().squeeze(1)
    return Plan(
        queries.to(device),
        real.to(device),
        torch.cat((prefix, keys), dim=1).to(device),
        slots.to(device),
        _flat([axis.kind[:, None] for axis in axes], tuple(len(axis.allowed) for axis in axes)).squeeze(1).to(device),
        seen.to(device),
        tuple(offset.to(device) for offset in _offsets(axes)),
        tuple(axis.keys.shape[1] for axis in axes),
        _selector([axis.keys.shape[1] for axis in axes], pattern.prefix).to(device),
    )


@lru_cache(maxsize=256)
def tile_sizes(pattern: GridPattern) -> tuple[int, ...]:
    """Return the queries per tile along each axis that cost least.

    Small tiles waste fewer pairs on keys that only some of their queries see, large ones gather fewer keys and
    multiply larger matrices. The weights were fitted on a CPU (float32, head_dim 32 to 64): nanoseconds per pair,
    gathered key, query and tile.
    """
    choices = []
    for axis, size in enumerate(pattern.query_grid):
        sizes = sorted({min(tile, size) for tile in TILE_SIZES} | {size})
        choices.append([(tile, *axis_sizes(pattern, axis, tile)) for tile in sizes])

    def cost(axes: tuple[tuple[int, int, int], ...]) -> tuple[bool, float]:
        queries, count, span = (math.prod(axis[index] for axis in axes) for index in range(3))
        pairs = queries * (span + pattern.prefix)
        return pairs > MAX_PAIRS and queries > 1, count * (4.0 * pairs + 10.0 * span + 10.0 * queries + 300.0)

    return tuple(axis[0] for axis in min(itertools.product(*choices), key=cost))


def _flat(indices: list[Tensor], grid: tuple[int, ...]) -> Tensor:
    """Return row-major indices (T, X) of the product of per-axis coordinates (T_a, X_a)."""
    flat = torch.zeros(1, 1, dtype=torch.long)
    for index, size in zip(indices, grid, strict=True):
        flat = (flat[:, None, :, None] * size + index[None, :, None, :]).flatten(2).flatten(0, 1)
    return flat


def _product(parts: list[Tensor]) -> Tensor:
    """Return the logical product (T, X) of per-axis bools (T_a, X_a)."""
    product = torch.ones(1, 1, dtype=torch.bool)
    for part in parts:
        product = (product[:, None, :, None] & part[None, :, None, :]).flatten(2).flatten(0, 1)
    return product


def _allowed(axes: list[AxisTiles]) -> Tensor:
    """Return the logical product (kinds, Q, S) of the axes' (kinds_a, Q_a, S_a)."""
    product = torch.ones(1, 1, 1, dtype=torch.bool)
    for axis in axes:
        pairs = product[:, None, :, None, :, None] & axis.allowed[None, :, None, :, None, :]
        product = pairs.flatten(4).flatten(2, 3).flatten(0, 1)
    return product


def _offsets(axes: list[AxisTiles]) -> list[Tensor]:
    """Return per axis the relative positions (kinds, Q, S_axis) of the product's kinds and queries."""
    kinds, queries = [len(axis.allowed) for axis in axes], [axis.allowed.shape[1] for axis in axes]
    results = []
    for number, axis in enumerate(axes):
        before_kinds, after_kinds = math.prod(kinds[:number]), math.prod(kinds[number + 1 :])
        before, after = math.prod(queries[:number]), math.prod(queries[number + 1 :])
        offset = axis.offset[None, :, None, None, :, None, :]
        offset = offset.expand(before_kinds, -1, after_kinds, before, -1, after, -1)
        results.append(offset.flatten(3, 5).flatten(0, 2))
    return results


def _selector(spans: list[int], prefix: int) -> Tensor:
    """Return for each axis and coordinate of a box which of its keys have it, (sum of spans, P + S)."""
    coordinates = torch.meshgrid([torch.arange(span) for span in spans], indexing="ij")
    parts = [torch.arange(span)[:, None] == place.flatten() for span, place in zip(spans, coordinates, strict=True)]
    grid = torch.cat(parts).float()
    return torch.cat((grid.new_zeros(len(grid), prefix), grid), dim=1)
