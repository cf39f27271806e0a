"""Attention by ``torch.nn.functional.scaled_dot_product_attention``: any device, differentiable, O(N) memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vislm.kernels.bias_rows import additive_rows
from vislm.kernels.patterns import Causal, Dense
from vislm.kernels.request import Answer, AttentionRequest
from vislm.kernels.shapes import four_axes
from vislm.kernels.tiled_statistics import tiled_statistics

MAX_MASK_ELEMENTS = 1 << 20


def supports(request: AttentionRequest) -> str | None:
    """Return None: every pattern runs through its mask, on every device."""
    return None


def run(request: AttentionRequest) -> Answer:
    """Return the output of fused attention, and tiled statistics.

    Dense and square causal attention is one fused call. Anything with a mask or additive logits is one call per tile
    of queries, so that no mask larger than ``(B, H, tile, Nk)`` is built. Additive logits that are wider than the
    query's dtype are not rounded to it: that call runs in the wider dtype.
    """
    output = None if request.value is None else _output(request, request.value)
    return Answer(output, tiled_statistics(request, output))


def _output(request: AttentionRequest, value: Tensor) -> Tensor:
    query, key = request.query, request.key
    is_causal = _fused_causality(request, value)
    groups = query.shape[1] // key.shape[1]
    native = is_causal is not None and _shares_key_heads(query)
    if groups > 1 and not native:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if is_causal is not None:
        return scaled_dot_product_attention(
            query, key, value, scale=request.scale, is_causal=is_causal, enable_gqa=native and groups > 1
        )
    num_queries = request.shape.num_queries
    rows = max(1, MAX_MASK_ELEMENTS // max(1, request.shape.num_keys))
    tiles = [_tile(request, key, value, first, min(first + rows, num_queries)) for first in range(0, num_queries, rows)]
    return torch.cat(tiles, dim=2) if tiles else query.new_zeros(*query.shape[:3], value.shape[-1])


def _fused_causality(request: AttentionRequest, value: Tensor) -> bool | None:
    """Return ``is_causal`` if one fused call without a mask is exact; None if not."""
    additive = request.bias is not None or request.key_logits is not None
    num_queries, num_keys = request.shape.num_queries, request.shape.num_keys
    # Unequal head sizes have no fused kernel everywhere; PyTorch would build the whole matrix.
    if additive or value.shape[-1] != request.query.shape[-1]:
        return None
    if isinstance(request.pattern, Dense) or (isinstance(request.pattern, Causal) and num_queries == 1):
        return False
    return True if isinstance(request.pattern, Causal) and num_queries == num_keys else None


def _shares_key_heads(query: Tensor) -> bool:
    """Return whether the fused kernel takes fewer key heads; elsewhere PyTorch would build the whole matrix."""
    return query.device.type == "cpu" or (query.device.type == "cuda" and query.dtype.itemsize == 2)


def _tile(request: AttentionRequest, key: Tensor, value: Tensor, first: int, last: int) -> Tensor:
    """Return the output of the queries ``first:last``."""
    query = request.query[:, :, first:last]
    mask = _mask(request, first, last)
    blind = _blind(mask)
    if mask.dtype == torch.bool:
        mask = mask | blind  # a row that sees nothing is NaN in some kernels, so let it see and drop its output
    else:
        mask = mask.masked_fill(blind, 0.0)
        query, key, value = (_widened(tensor, mask) for tensor in (query, key, value))
        mask = mask.to(query.dtype)
    mask = mask.expand(-1, -1, last - first, key.shape[2])
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=request.scale)
    return out.to(request.query.dtype).masked_fill(blind, 0.0)


def _mask(request: AttentionRequest, first: int, last: int) -> Tensor:
    """Return the rows ``first:last`` of the mask (bool), or of the additive logits with ``-inf`` where not allowed."""
    _, _, num_queries, num_keys, device = request.shape
    position = torch.arange(first, last, device=device) + num_keys - num_queries
    allowed = four_axes(request.pattern.mask(position[:, None], torch.arange(num_keys, device=device)[None]))
    additive = additive_rows(request, torch.arange(first, last, device=device)[None])
    return allowed if additive is None else additive.masked_fill(~allowed, -torch.inf)


def _blind(mask: Tensor) -> Tensor:
    """Return True ``(..., 1)`` for rows that see no key."""
    return ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else (mask == -torch.inf).all(-1, keepdim=True)


def _widened(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, mask.dtype))
