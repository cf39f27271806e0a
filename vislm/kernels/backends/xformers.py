"""Dense and causal attention by xFormers, where it is installed with operators for the card.

xFormers is asked which of its operators take a call before it is made. It is imported by the first call on CUDA tensors
that it might take, not earlier: that costs seconds and may log warnings about its build. Nothing here has run on a GPU
yet.

Source: ``xformers.ops.memory_efficient_attention`` of xFormers 0.0.35; https://github.com/facebookresearch/xformers.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vislm.kernels.backends.fused_output import beyond_output, fused_answer
from vislm.kernels.bias_rows import additive_rows
from vislm.kernels.patterns import Causal, Dense
from vislm.kernels.request import Answer, AttentionRequest

_ALIGNMENT = 8  # elements: the rows of an additive mask begin at multiples of it


def supports(request: AttentionRequest) -> str | None:
    """Return why xFormers cannot run the request, by its own words where the call is one of its kind; None = it can."""
    if not isinstance(request.pattern, (Dense, Causal)):
        return f"has no mask for the pattern {type(request.pattern).__name__}"
    if request.bias is not None and not isinstance(request.bias, Tensor):
        return f"takes no {type(request.bias).__name__}"
    reason = beyond_output(request) or _beyond_logits(request) or _beyond_gradients(request)
    if reason is not None:
        return reason
    device = request.shape.device.type
    if device != "cuda":
        return f"needs CUDA tensors, these are on {device}"
    if not _installed():
        return "xFormers is not installed"
    return None if _operators(request) is not None else _refusals(request)


def run(request: AttentionRequest) -> Answer:
    """Return the answer to a request that :func:`supports` accepts."""
    fmha = _fmha()
    operators = _operators(request)
    assert operators is not None  # supports() found them
    assert request.value is not None
    key, value = (_repeated(tensor, request) for tensor in (request.key, request.value))
    logits, blind = _logits(request)
    mask = _causal_mask(request) if logits is None else logits
    inputs = (request.query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
    if request.statistics.lse:
        output, lse = fmha.memory_efficient_attention_forward_requires_grad(
            *inputs, scale=request.scale, op=operators[0]
        )
        lse = lse[..., : request.shape.num_queries]  # some operators pad the queries
    else:
        output, lse = fmha.memory_efficient_attention(*inputs, scale=request.scale, op=operators), None
    output = output.transpose(1, 2)
    if blind is not None:
        output = output.masked_fill(blind, 0.0)
        lse = None if lse is None else lse.masked_fill(blind.squeeze(-1), -torch.inf)
    return fused_answer(request, output, lse)


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("xformers") is not None


def _fmha() -> Any:
    return import_module("xformers.ops.fmha")


def _beyond_logits(request: AttentionRequest) -> str | None:
    if isinstance(request.pattern, Causal) and request.shape.num_queries > request.shape.num_keys:
        return "has no causal mask for more queries than keys"
    for name in ("bias", "key_logits"):
        given = getattr(request, name)
        if given is not None and given.dtype != request.query.dtype:
            return f"adds logits in the query's dtype {request.query.dtype}, {name} is {given.dtype}"
    return None


def _beyond_gradients(request: AttentionRequest) -> str | None:
    if not request.differentiable:
        return None
    if request.statistics.lse:
        return "has no gradient of lse; use torch.no_grad() if none is needed"
    inputs = (request.query, request.key, request.value)
    if not any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return "has no gradient of the additive logits alone"
    return None


def _operators(request: AttentionRequest) -> tuple[Any, Any] | None:
    """Return the first pair (forward, backward) of xFormers that takes the request; None if none does."""
    return next((pair for pair, reasons in _judged(request) if not reasons), None)


def _refusals(request: AttentionRequest) -> str:
    told = [f"{pair[0].NAME}: {', '.join(dict.fromkeys(reasons))}" for pair, reasons in _judged(request)]
    return f"xFormers has no operator for it ({'; '.join(told)})"


def _judged(request: AttentionRequest) -> list[tuple[tuple[Any, Any], list[str]]]:
    """Return xFormers' pairs of operators, the faster first, each with why it does not take the request."""
    fmha = _fmha()
    described = _described(request)
    judged = []
    for pair in (fmha.MemoryEfficientAttentionFlashAttentionOp, fmha.MemoryEfficientAttentionCutlassOp):
        asked = pair if request.differentiable else pair[:1]
        judged.append((pair, [reason for operator in asked for reason in operator.not_supported_reasons(described)]))
    return judged


def _described(request: AttentionRequest) -> Any:
    """Return the call as xFormers' operators judge it; what :func:`run` copies has its layout and no memory here."""
    fmha = _fmha()
    batch, num_heads, num_queries, num_keys, _ = request.shape

    def repeated(tensor: Tensor) -> Tensor:
        if tensor.shape[1] == num_heads:
            return tensor
        return torch.empty(batch, num_heads, *tensor.shape[2:], dtype=tensor.dtype, device="meta")

    mask = _causal_mask(request)
    additive = [term for term in (request.bias, request.key_logits) if isinstance(term, Tensor)]
    if additive:
        wide = num_keys + -num_keys % _ALIGNMENT
        mask = torch.empty(batch, num_heads, num_queries, wide, dtype=request.query.dtype, device="meta")[
            ..., :num_keys
        ]
        mask.requires_grad_(any(term.requires_grad for term in additive))
    assert request.value is not None
    query, key, value = request.query, repeated(request.key), repeated(request.value)
    return fmha.Inputs(
        query=query.transpose(1, 2),
        key=key.transpose(1, 2),
        value=value.transpose(1, 2),
        attn_bias=mask,
        scale=request.scale,
    )


def _repeated(tensor: Tensor, request: AttentionRequest) -> Tensor:
    """Return a key or value with one head per query head: xFormers shares heads in its forward pass only."""
    groups = request.shape.num_heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _causal_mask(request: AttentionRequest) -> Any:
    """Return xFormers' mask of a causal pattern, None for a dense one."""
    if not isinstance(request.pattern, Causal):
        return None
    masks = _fmha().attn_bias
    square = request.shape.num_queries == request.shape.num_keys
    return masks.LowerTriangularMask() if square else masks.LowerTriangularFromBottomRightMask()


def _logits(request: AttentionRequest) -> tuple[Tensor | None, Tensor | None]:
    """Return the additive logits ``(B, Hq, Nq, Nk)``, pattern included, and True for queries that see nothing."""
    batch, num_heads, num_queries, num_keys, device = request.shape
    query, key = torch.arange(num_queries, device=device), torch.arange(num_keys, device=device)
    logits = additive_rows(request, query[None])
    if logits is None:
        return None, None
    if isinstance(request.pattern, Causal):
        hidden = ~request.pattern.mask(query[:, None] + num_keys - num_queries, key[None])
        logits = logits.masked_fill(hidden, -torch.inf)
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(blind, 0.0)  # such rows are NaN in some kernels: let them see, drop their output
    logits = logits.expand(*logits.shape[:-1], num_keys)
    aligned = torch.nn.functional.pad(logits, (0, -num_keys % _ALIGNMENT)).contiguous()
    return aligned.expand(batch, num_heads, num_queries, -1)[..., :num_keys], blind
