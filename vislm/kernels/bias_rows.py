"""The dense rows of any bias, for backends that look at whole rows of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vislm.kernels.bias import AxialBias, RelativeBias
from vislm.kernels.patterns.grid import (
    GridPattern,
    key_coordinate,
    padded_grid,
    query_coordinate,
    query_grid_index,
)
from vislm.kernels.request import AttentionRequest


def rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return the rows ``(B, H, R, ...)`` of the queries in ``index`` ``(1 or B, R)``."""
    if len(index) == 1:
        return tensor.index_select(2, index[0])
    sample = torch.arange(len(index), device=index.device)[:, None]
    return tensor.expand(len(index), -1, -1, -1)[sample, :, index].transpose(1, 2)


def additive_rows(request: AttentionRequest, index: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return bias plus key logits of the queries ``index``, broadcastable to ``(B, Hq, R, Nk)``; None without any.

    Args:
        request: a lowered call.
        index: query indices ``(1 or B, R)``.
        dtype: of the sum; None = as PyTorch promotes the two.
    """
    terms = [term for term in (_bias_rows(request, index), request.key_logits) if term is not None]
    if not terms:
        return None
    return sum((term.to(dtype) for term in terms[1:]), terms[0].to(dtype))


def additive_range(request: AttentionRequest, first: int, last: int, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return :func:`additive_rows` of the queries ``first:last``; a dense bias alone is not copied."""
    bias = request.bias
    if isinstance(bias, Tensor) and request.key_logits is None:
        return (bias if bias.shape[2] == 1 else bias[:, :, first:last]).to(dtype)
    return additive_rows(request, torch.arange(first, last, device=request.shape.device)[None], dtype)


def _bias_rows(request: AttentionRequest, index: Tensor) -> Tensor | None:
    bias = request.bias
    if bias is None:
        return None
    if isinstance(bias, Tensor):
        return bias if bias.shape[2] == 1 else rows(bias, index)
    pattern = request.pattern
    assert isinstance(bias, (RelativeBias, AxialBias))  # what lowering leaves
    assert isinstance(pattern, GridPattern)
    num_queries, num_keys = request.shape.num_queries, request.shape.num_keys
    query = query_grid_index(pattern, index + num_keys - num_queries)[:, None, :, None]
    key = torch.arange(num_keys, device=index.device)[None] - pattern.prefix
    if isinstance(bias, RelativeBias):
        dense = _table_entries(bias, pattern, query, key)
    else:
        dense = _axial_entries(bias, pattern, query, key)
    return dense.masked_fill((query < 0) | (key < 0), 0.0)


def _table_entries(bias: RelativeBias, pattern: GridPattern, query: Tensor, key: Tensor) -> Tensor:
    """Return the table's entry for each pair, (1 or B, H, R, Nk); pairs outside of the table get a nearby one."""
    sizes = bias.table.shape[1:]
    flat = torch.zeros((), dtype=torch.long, device=key.device)
    for axis, size in enumerate(sizes):
        flat = flat * size + table_index(bias.origins[axis], size, pattern, axis, query, key)
    return bias.table.flatten(1)[:, flat[:, 0]].transpose(0, 1)


def _axial_entries(bias: AxialBias, pattern: GridPattern, query: Tensor, key: Tensor) -> Tensor:
    index = query[:, 0, :, 0].clamp_min(0)
    total = None
    for axis, logits in enumerate(bias.logits):
        mine = rows(logits, index)
        offset = table_index(bias.origin[axis], logits.shape[-1], pattern, axis, query, key)
        entries = mine.gather(-1, offset.expand(*mine.shape[:3], -1))
        total = entries if total is None else total + entries
    assert total is not None
    return total


def table_index(origin: int, size: int, pattern: GridPattern, axis: int, query: Tensor, key: Tensor) -> Tensor:
    """Return where in a table of ``size`` relative positions along ``axis`` each pair looks; 0 to ``size - 1``.

    Args:
        origin: index of relative position 0.
        size: entries of the table along ``axis``.
        pattern: the grid pattern of the call.
        axis: of the grid.
        query: row-major indices on the query grid.
        key: row-major indices of the grid's keys, broadcastable with ``query``.
    """
    anchor = pattern.anchor(axis, query_coordinate(pattern, axis, query))
    steps = torch.div(key_coordinate(pattern, axis, key) - anchor, pattern.step(axis), rounding_mode="floor")
    return (steps + origin).clamp(0, size - 1)


def grid_sizes(pattern: GridPattern) -> tuple[int, int]:
    """Return how many queries and keys the grid itself has, without prefix tokens."""
    return math.prod(pattern.query_grid), math.prod(padded_grid(pattern))
