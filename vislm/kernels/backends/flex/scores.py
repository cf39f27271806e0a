"""Additive logits as FlexAttention wants them: a function of a score and four indices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vislm.kernels.bias import AxialBias, RelativeBias
from vislm.kernels.bias_rows import table_index
from vislm.kernels.patterns.grid import GridPattern, query_grid_index
from vislm.kernels.request import AttentionRequest

Term = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def score_mod(request: AttentionRequest) -> ScoreMod | None:
    """Return what adds the request's bias and key logits to a score, in its exact dtype; None without either.

    Each tensor is looked up once, as the kernel's backward needs it.
    """
    terms = [term for term in (_bias(request), _dense(request, request.key_logits)) if term is not None]
    if not terms:
        return None
    first, second = terms[0], terms[-1]
    if len(terms) == 1:
        return lambda score, batch, head, query, key: score + first(batch, head, query, key)
    return lambda score, batch, head, query, key: (
        score + first(batch, head, query, key) + second(batch, head, query, key)
    )


def _bias(request: AttentionRequest) -> Term | None:
    bias = request.bias
    if bias is None or isinstance(bias, Tensor):
        return _dense(request, bias)
    assert isinstance(bias, (RelativeBias, AxialBias))  # what lowering leaves
    return _relative(request, bias) if isinstance(bias, RelativeBias) else _axial(request, bias)


def _dense(request: AttentionRequest, logits: Tensor | None) -> Term | None:
    if logits is None:
        return None
    tensor = _exact(request, logits)
    varies = [size > 1 for size in tensor.shape]

    def term(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        index = (batch, head, query, key)
        return tensor[tuple(i if along else 0 for i, along in zip(index, varies, strict=True))]

    return term


def _relative(request: AttentionRequest, bias: RelativeBias) -> Term:
    pattern, offset = _grid(request)
    table = _exact(request, bias.table)
    origins, sizes = bias.origins, tuple(table.shape[1:])
    per_head = table.shape[0] > 1

    def term(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query, key = query_grid_index(pattern, query + offset), key - pattern.prefix
        index = [table_index(origins[axis], size, pattern, axis, query, key) for axis, size in enumerate(sizes)]
        return _between_patches(table[(head if per_head else 0, *index)], query, key)

    return term


def _axial(request: AttentionRequest, bias: AxialBias) -> Term:
    pattern, offset = _grid(request)
    logits, origins = tuple(_exact(request, tensor) for tensor in bias.logits), bias.origin

    def term(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query, key = query_grid_index(pattern, query + offset), key - pattern.prefix
        total = 0.0
        for axis, tensor in enumerate(logits):
            entry = table_index(origins[axis], tensor.shape[-1], pattern, axis, query, key)
            total = total + tensor[batch, head, query.clamp_min(0), entry]
        assert isinstance(total, Tensor)
        return _between_patches(total, query, key)

    return term


def _grid(request: AttentionRequest) -> tuple[GridPattern, int]:
    pattern = request.pattern
    assert isinstance(pattern, GridPattern)  # checked with the bias
    return pattern, request.shape.num_keys - request.shape.num_queries


def _exact(request: AttentionRequest, tensor: Tensor) -> Tensor:
    tensor = tensor.to(request.dtype)
    return tensor.detach() if tensor.device.type == "cpu" else tensor  # no backward there


def _between_patches(logit: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the logit, or 0 where the query or the key is a prefix token."""
    return torch.where((query < 0) | (key < 0), torch.zeros_like(logit), logit)
