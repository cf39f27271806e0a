"""Rewriting a call into a plainer one with the same result, so that a backend knows fewer forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from vislm.kernels.bias import AxialBias, DecoupledBias, LowRankBias
from vislm.kernels.bias_rows import grid_sizes
from vislm.kernels.patterns.blocked import Blocked
from vislm.kernels.patterns.grid import GridPattern
from vislm.kernels.request import Answer, AttentionRequest
from vislm.kernels.statistics import Statistics


def lowered(request: AttentionRequest) -> tuple[AttentionRequest, Callable[[Answer], Answer]]:
    """Return an equal call for the backends, and what turns its answer into the original call's.

    Low-rank biases become query and key channels, decoupled ones the logits of each query and axis, and a zero border
    becomes zero keys. Afterwards the bias is None, dense, a :class:`RelativeBias` or an :class:`AxialBias`.
    """
    restore = _same
    if isinstance(request.bias, LowRankBias):
        request = _with_channels(request, request.bias)
    elif isinstance(request.bias, DecoupledBias):
        request = _with_axial_logits(request, request.bias)
    pattern = request.pattern
    if isinstance(pattern, Blocked) and pattern.border == "zero" and not pattern.padded:
        request, restore = _with_zero_keys(request, pattern)
    return request, restore


def _same(answer: Answer) -> Answer:
    return answer


def _with_channels(request: AttentionRequest, bias: LowRankBias) -> AttentionRequest:
    """Return the call with ``scale q k^T + Bq Bk^T`` written as one product: ``[scale q, Bq] [k, Bk]^T``."""
    dtype = request.query.dtype
    for factor in (bias.query_factor, bias.key_factor):
        dtype = torch.promote_types(dtype, factor.dtype)
    batch, num_heads, num_queries, num_keys, _ = request.shape
    key_heads = request.key.shape[1]
    key, value = request.key, request.value
    if bias.key_factor.shape[1] not in (1, key_heads):  # every query head has its own key factor
        groups = num_heads // key_heads
        key, key_heads = key.repeat_interleave(groups, dim=1), num_heads
        value = None if value is None else value.repeat_interleave(groups, dim=1)
    query_factor = bias.query_factor.to(dtype).expand(batch, num_heads, num_queries, -1)
    key_factor = bias.key_factor.to(dtype).expand(batch, key_heads, num_keys, -1)
    return replace(
        request,
        query=torch.cat((request.query.to(dtype) * request.scale, query_factor), dim=-1),
        key=torch.cat((key.to(dtype), key_factor), dim=-1),
        value=None if value is None else value.to(dtype),
        bias=None,
        scale=1.0,
    )


def _with_axial_logits(request: AttentionRequest, bias: DecoupledBias) -> AttentionRequest:
    pattern = request.pattern
    assert isinstance(pattern, GridPattern)  # checked with the bias
    query = request.query[:, :, -grid_sizes(pattern)[0] :].to(request.dtype)
    if bias.scaled:
        query = query * request.scale
    logits = tuple(query @ table.to(request.dtype).transpose(-1, -2) for table in bias.tables)
    return replace(request, bias=AxialBias(logits, bias.origins))


def _with_zero_keys(request: AttentionRequest, pattern: Blocked) -> tuple[AttentionRequest, Callable[[Answer], Answer]]:
    pattern = Blocked(
        pattern.grid,
        pattern.block,
        pattern.halo,
        query_stride=pattern.query_stride,
        border="zero",
        prefix=pattern.prefix,
        padded=True,
    )
    key = _surrounded(request.key, pattern, axis=2)
    inner = _surrounded(torch.ones(request.shape.num_keys, dtype=torch.bool, device=key.device), pattern, axis=0)
    kept = inner.nonzero().squeeze(1)

    def spread(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        whole = tensor.expand(*tensor.shape[:-1], request.shape.num_keys)  # zero keys get nothing of a shared logit
        return _surrounded(whole, pattern, axis=-1)

    mass = request.statistics.mass
    statistics = replace(
        request.statistics,
        mass=None if mass is None else {name: _surrounded(group, pattern, axis=1) for name, group in mass.items()},
    )
    padded = replace(
        request,
        key=key,
        value=None if request.value is None else _surrounded(request.value, pattern, axis=2),
        pattern=pattern,
        bias=spread(request.bias) if isinstance(request.bias, Tensor) else request.bias,
        key_logits=spread(request.key_logits),
        statistics=statistics,
    )

    def restore(answer: Answer) -> Answer:
        statistics: Statistics = replace(
            answer.statistics,
            rows=None if answer.statistics.rows is None else answer.statistics.rows[..., kept],
            received=None if answer.statistics.received is None else answer.statistics.received[..., kept],
            weights="unnormalised",  # a part of each row went to the zero keys
        )
        return answer._replace(statistics=statistics)

    return padded, restore


def _surrounded(tensor: Tensor, pattern: Blocked, axis: int) -> Tensor:
    """Return the tensor with zero keys around the grid, which lies along ``axis`` behind the prefix tokens."""
    axis = axis % tensor.ndim
    prefix, grid = tensor.split((pattern.prefix, tensor.shape[axis] - pattern.prefix), dim=axis)
    sides = [side for margin in reversed(pattern.margin) for side in (margin, margin)]
    behind = [0, 0] * (tensor.ndim - 1 - axis)
    padded = pad(grid.unflatten(axis, pattern.grid), behind + sides).flatten(axis, axis + len(pattern.grid) - 1)
    return torch.cat((prefix, padded), dim=axis) if pattern.prefix else padded
