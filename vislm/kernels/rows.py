"""Whole rows of attention, for chosen queries or a few at a time: what every backend can fall back on exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vislm.kernels.bias_rows import additive_rows, rows
from vislm.kernels.normalization import normalized
from vislm.kernels.patterns import Dense
from vislm.kernels.request import AttentionRequest

MAX_ROWS = 128
MAX_ELEMENTS = 1 << 24

_Result = TypeVar("_Result")


def row_logits(request: AttentionRequest, index: Tensor) -> Tensor:
    """Return the logits ``(B, Hq, R, Nk)`` of the queries ``index`` ``(1 or B, R)``, ``-inf`` where not allowed."""
    batch, num_heads, _, num_keys, device = request.shape
    query, key = rows(request.query, index).to(request.dtype), request.key.to(request.dtype)
    # The query heads that share a key head are stacked along the rows, so that keys are never repeated.
    stacked = query.reshape(batch, key.shape[1], num_heads // key.shape[1] * index.shape[1], query.shape[-1])
    logits = (stacked @ key.transpose(-1, -2) * request.scale).view(batch, num_heads, index.shape[1], num_keys)
    additive = additive_rows(request, index, request.dtype)
    if additive is not None:
        logits = logits + additive
    if isinstance(request.pattern, Dense):
        return logits
    return logits.masked_fill(
        ~request.pattern.mask(row_position(request, index), torch.arange(num_keys, device=device)[None]), -torch.inf
    )


def row_weights(request: AttentionRequest, index: Tensor) -> Tensor:
    """Return the attention rows ``(B, Hq, R, Nk)`` of the queries ``index`` ``(1 or B, R)``."""
    return normalized(request.normalize, row_logits(request, index), row_position(request, index))[0]


def row_position(request: AttentionRequest, index: Tensor) -> Tensor:
    """Return the positions ``(1 or B, 1, R, 1)`` of queries on the key axis."""
    return (index + request.shape.num_keys - request.shape.num_queries)[:, None, :, None]


def row_output(request: AttentionRequest, value: Tensor) -> Tensor:
    """Return the output ``(B, Hq, Nq, Dv)`` from explicit rows, a few at a time."""
    batch, num_heads, num_queries, _, device = request.shape
    key_heads = value.shape[1]

    def compute(index: Tensor) -> Tensor:
        stacked = row_weights(request, index).view(batch, key_heads, -1, request.shape.num_keys)
        return (stacked @ value.to(request.dtype)).view(batch, num_heads, index.shape[1], -1)

    everyone = torch.arange(num_queries, device=device)[None]
    parts = list(visit(request, everyone, compute))
    return torch.cat(parts, dim=2).to(request.query.dtype) if parts else _nothing(request, value)


def visit(request: AttentionRequest, index: Tensor, compute: Callable[[Tensor], _Result]) -> Iterator[_Result]:
    """Yield ``compute`` of each tile of queries, recomputed in the backward pass instead of kept."""
    logits_per_row = request.shape.batch * request.shape.num_heads * request.shape.num_keys
    count = max(1, min(MAX_ROWS, MAX_ELEMENTS // max(1, logits_per_row)))
    for tile in index.split(count, dim=1):
        if request.differentiable:
            yield checkpoint(compute, tile, use_reentrant=False, preserve_rng_state=False)
        else:
            yield compute(tile)


def _nothing(request: AttentionRequest, value: Tensor) -> Tensor:
    return request.query.new_zeros(*request.query.shape[:3], value.shape[-1])
