"""Attention as the papers write it: the full matrix, in float32 or float64. The judge of all other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from vislm.kernels.bias_rows import additive_rows
from vislm.kernels.normalization import normalized, row_entropy
from vislm.kernels.request import Answer, AttentionRequest, CheckedStatistics
from vislm.kernels.statistics import Statistics


def supports(request: AttentionRequest) -> str | None:
    """Return None: the reference runs everything."""
    return None


def run(request: AttentionRequest) -> Answer:
    """Return ``normalize(scale q k^T + bias + key_logits, where the pattern allows) v`` and the statistics of it.

    O(Nq Nk) memory. Arithmetic in float32 (float64 for float64 inputs), output in the query's dtype.
    """
    num_queries, num_keys, device = request.shape.num_queries, request.shape.num_keys, request.shape.device
    position = torch.arange(num_queries, device=device)[:, None] + num_keys - num_queries
    logits = _logits(request, position)
    weights, log_sum = normalized(request.normalize, logits, position)
    exact = None if request.value is None else weights @ _per_query_head(request.value.to(request.dtype), request)
    output = None if exact is None else exact.to(request.query.dtype)
    return Answer(output, _statistics(request, logits, weights, log_sum, exact))


def _logits(request: AttentionRequest, position: Tensor) -> Tensor:
    num_queries, num_keys, device = request.shape.num_queries, request.shape.num_keys, request.shape.device
    key = _per_query_head(request.key.to(request.dtype), request)
    logits = request.query.to(request.dtype) @ key.transpose(-1, -2) * request.scale
    additive = additive_rows(request, torch.arange(num_queries, device=device)[None], request.dtype)
    if additive is not None:
        logits = logits + additive
    allowed = request.pattern.mask(position, torch.arange(num_keys, device=device)[None])
    return logits.masked_fill(~allowed, -torch.inf)


def _per_query_head(tensor: Tensor, request: AttentionRequest) -> Tensor:
    return tensor.repeat_interleave(request.shape.num_heads // tensor.shape[1], dim=1)


def _statistics(
    request: AttentionRequest, logits: Tensor, weights: Tensor, log_sum: Tensor, output: Tensor | None
) -> Statistics:
    wanted, mass = request.statistics, None
    if wanted.mass is not None:
        mass = {name: (weights * group[:, None, None]).sum(-1) for name, group in wanted.mass.items()}
    return Statistics(
        lse=log_sum if wanted.lse else None,
        rows=None if wanted.rows is None else _take(weights, wanted.rows),
        received=_received(wanted, weights),
        mass=mass,
        entropy=row_entropy(request.normalize, logits, weights, log_sum) if wanted.entropy else None,
        maximum=_largest(weights) if wanted.maximum else None,
        output_norm=output.norm(dim=-1) if wanted.output_norm and output is not None else None,
        weights=request.weights,
    )


def _received(wanted: CheckedStatistics, weights: Tensor) -> Tensor | None:
    if wanted.received:
        return weights.sum(-2)
    if wanted.received_where is not None:
        return (weights * wanted.received_where[:, None, :, None]).sum(-2)
    if wanted.received_queries is not None:
        return _take(weights, wanted.received_queries).sum(-2)
    return None


def _take(weights: Tensor, index: Tensor) -> Tensor:
    """Return the rows (B, H, R, Nk) of the queries in index (1 or B, R)."""
    index = index.expand(len(weights), -1)
    return torch.stack([sample[:, chosen] for sample, chosen in zip(weights, index, strict=True)])


def _largest(weights: Tensor) -> Tensor:
    return weights.amax(-1) if weights.shape[-1] else weights.sum(-1)
