"""Patterns as FlexAttention wants them: a function of four indices, and which blocks it leaves anything of."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from vislm.kernels.patterns import Blocked, Causal, Dense, Masked, Neighborhood, Padded, Pattern, Window
from vislm.kernels.request import AttentionRequest
from vislm.kernels.shapes import four_axes

BLOCK = 128
_VALUES = (Causal, Neighborhood, Blocked, Window)  # patterns without tensors: equal ones share their blocks

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def block_mask(request: AttentionRequest) -> BlockMask | None:
    """Return the blocks that the request's pattern leaves; None where every query sees every key."""
    pattern, shape = request.pattern, request.shape
    if isinstance(pattern, Dense):
        return None
    find = _kept_blocks if isinstance(pattern, _VALUES) else _blocks
    return find(pattern, shape.num_queries, shape.num_keys, shape.device)


@lru_cache(maxsize=64)
def _kept_blocks(pattern: Pattern, num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):  # or a later call with gradients could not use them
        return _blocks(pattern, num_queries, num_keys, device)


def _blocks(pattern: Pattern, num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    """Return the block mask from one row of blocks at a time: the whole mask of a large grid would not fit."""
    offset, columns = num_keys - num_queries, -(-num_keys // BLOCK)
    key = torch.arange(num_keys, device=device)[None]
    counts = []
    for first in range(0, num_queries, BLOCK):
        position = torch.arange(first, min(first + BLOCK, num_queries), device=device)[:, None] + offset
        seen = four_axes(pattern.mask(position, key)).expand(-1, -1, len(position), num_keys)
        counts.append(pad(seen.sum(-2), (0, columns * BLOCK - num_keys)).unflatten(-1, (columns, BLOCK)).sum(-1))
    count = torch.stack(counts, dim=2)
    whole = count == BLOCK * BLOCK
    partial = (count > 0) & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(partial),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(pattern, offset),
        seq_lengths=(num_queries, num_keys),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of each row are chosen, and the indices of all with the chosen ones first."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _mask_mod(pattern: Pattern, offset: int) -> MaskMod:
    """Return the pattern as a function of single indices; those of queries count from the first query."""
    if isinstance(pattern, Padded):
        valid, causal = pattern.valid, pattern.causal

        def padded(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            visible = valid[batch, key]
            return visible & (key <= query + offset) if causal else visible

        return padded
    if isinstance(pattern, Masked):
        allowed = pattern.allowed
        per_sample, per_head = allowed.shape[0] > 1, allowed.shape[1] > 1

        def masked(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return allowed[batch if per_sample else 0, head if per_head else 0, query, key]

        return masked

    def defined(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pattern.mask(query + offset, key)

    return defined
