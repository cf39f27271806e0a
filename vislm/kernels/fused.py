"""The output of attention by ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from vislm.kernels.bias_rows import additive_range
from vislm.kernels.patterns import Causal, Dense
from vislm.kernels.request import AttentionRequest
from vislm.kernels.shapes import four_axes

MAX_MASK_ELEMENTS = 1 << 20


def fused_output(request: AttentionRequest, value: Tensor) -> Tensor:
    """Return the output ``(B, Hq, Nq, Dv)`` of a softmax attention.

    Dense and square causal attention is one fused call. Anything with a mask or additive logits is one call per tile
    of queries, so that no mask larger than ``(B, H, tile, Nk)`` is built. Additive logits that are wider than the
    query's dtype are not rounded to it: that call runs in the wider dtype.
    """
    # Unequal head sizes have no fused kernel everywhere; PyTorch would build the whole matrix. Zeros change nothing.
    width = value.shape[-1]
    extra = width - request.query.shape[-1]
    if extra == 0:
        return _of_equal_sizes(request, value)
    value = pad(value, (0, max(0, -extra)))
    query, key = (pad(tensor, (0, max(0, extra))) for tensor in (request.query, request.key))
    return _of_equal_sizes(replace(request, query=query, key=key), value)[..., :width]


def _of_equal_sizes(request: AttentionRequest, value: Tensor) -> Tensor:
    query, key = request.query, request.key
    is_causal = _fused_causality(request)
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


def _fused_causality(request: AttentionRequest) -> bool | None:
    """Return ``is_causal`` if one fused call without a mask is exact; None if not."""
    additive = request.bias is not None or request.key_logits is not None
    num_queries, num_keys = request.shape.num_queries, request.shape.num_keys
    if additive:
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
    sees = blind.device.type == "cpu" and not bool(blind.any())
    if mask.dtype == torch.bool:
        mask = mask if sees else mask | blind  # a row that sees nothing is NaN in some kernels: let it see, drop it
    else:
        mask = mask if sees else mask.masked_fill(blind, 0.0)
        query, key, value = (_widened(tensor, mask) for tensor in (query, key, value))
        mask = mask.to(query.dtype)
    mask = mask.expand(-1, -1, last - first, key.shape[2])
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=request.scale)
    out = out.to(request.query.dtype)
    return out if sees else out.masked_fill(blind, 0.0)


def _mask(request: AttentionRequest, first: int, last: int) -> Tensor:
    """Return the rows ``first:last`` of the mask (bool), or of the additive logits with ``-inf`` where not allowed."""
    _, _, num_queries, num_keys, device = request.shape
    additive = additive_range(request, first, last)
    if additive is not None and isinstance(request.pattern, Dense):
        return additive
    position = torch.arange(first, last, device=device) + num_keys - num_queries
    allowed = four_axes(request.pattern.mask(position[:, None], torch.arange(num_keys, device=device)[None]))
    return allowed if additive is None else additive.masked_fill(~allowed, -torch.inf)


def _blind(mask: Tensor) -> Tensor:
    """Return True ``(..., 1)`` for rows that see no key."""
    if mask.dtype == torch.bool or mask.shape[-1] == 0:
        return ~mask.bool().any(-1, keepdim=True)
    return mask.detach().amax(-1, keepdim=True) == -torch.inf


def _widened(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, mask.dtype))
