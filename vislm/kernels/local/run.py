"""A call on a grid, answered tile by tile."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from vislm.kernels.bias import AxialBias, RelativeBias, tensors_of
from vislm.kernels.bias_rows import grid_sizes
from vislm.kernels.local.function import LocalAttention
from vislm.kernels.local.plan import Plan, plan_for
from vislm.kernels.local.tiles import Settings, Tensors
from vislm.kernels.patterns.grid import GridPattern
from vislm.kernels.request import AttentionRequest


def local_output(request: AttentionRequest, value: Tensor, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Return the output ``(B, Hq, Nq, Dv)`` of the grid's queries, and their log-sum-exp ``(B, Hq, Nq)`` if wanted.

    Args:
        request: a lowered call whose pattern is a :class:`GridPattern` and whose bias is not dense.
        value: ``(B, Hkv, Nk, Dv)``.
        wants_lse: softmax only.
    """
    settings, tensors = prepared(request, value, wants_lse)
    *given, axial = tensors
    output, lse = cast("tuple[Tensor, Tensor]", LocalAttention.apply(settings, *given, *axial))
    shape = (request.shape.batch, request.shape.num_heads, -1)
    return output.reshape(*shape, value.shape[-1]), lse.reshape(shape) if wants_lse else None


def prepared(request: AttentionRequest, value: Tensor, wants_lse: bool) -> tuple[Settings, Tensors]:
    """Return the call as the tiles see it."""
    pattern, bias = request.pattern, request.bias
    assert isinstance(pattern, GridPattern)
    batch, num_heads, _, num_keys, device = request.shape
    key_heads = request.key.shape[1]
    split = (batch * key_heads, num_heads // key_heads)
    plan = plan_for(pattern, device)
    key_logits = request.key_logits
    if key_logits is not None:
        key_logits = key_logits.expand(batch, num_heads, 1, num_keys).reshape(*split, num_keys)
    axial = bias.logits if isinstance(bias, AxialBias) else ()
    query = request.query[:, :, -grid_sizes(pattern)[0] :]
    tensors = Tensors(
        query.reshape(*split, *query.shape[2:]),
        request.key.flatten(0, 1),
        value.flatten(0, 1),
        _additive(plan, bias if isinstance(bias, RelativeBias) else None, key_heads, request.dtype),
        key_logits,
        tuple(logits.reshape(*split, *logits.shape[2:]) for logits in axial),
    )
    may_be_blind = request.key_logits is not None or _may_hide(bias)
    origin = bias.origin if isinstance(bias, AxialBias) else ()
    return Settings(plan, request.scale, request.normalize, origin, may_be_blind, wants_lse, request.dtype), tensors


def _additive(plan: Plan, bias: RelativeBias | None, key_heads: int, dtype: torch.dtype) -> Tensor:
    """Return the relative bias and the mask of each kind of tile, (Hkv or 1, kinds, G or 1, Q, P + S)."""
    if bias is None:
        return _mask(plan, dtype)
    # Two more entries: for prefix keys, and for hidden ones.
    entries = bias.table.to(dtype).flatten(1)
    entries = torch.cat(
        (entries, entries.new_zeros(len(entries), 1), entries.new_full((len(entries), 1), -torch.inf)), 1
    )
    index = _bias_index(plan, tuple(bias.table.shape[1:]), tuple(bias.origins))
    tiles = entries.index_select(1, index).unflatten(1, plan.allowed.shape)
    return tiles.unflatten(0, (key_heads, -1) if len(entries) > 1 else (1, 1)).transpose(1, 2)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a later call may need gradients
def _mask(plan: Plan, dtype: torch.dtype) -> Tensor:
    hidden = torch.zeros(plan.allowed.shape, dtype=dtype, device=plan.allowed.device)
    return hidden.masked_fill_(~plan.allowed, -torch.inf)[None, :, None]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _bias_index(plan: Plan, sizes: tuple[int, ...], origins: tuple[int, ...]) -> Tensor:
    """Return for each kind, query and key its entry in a flattened table of ``sizes``, or the two behind; flat."""
    (kinds, queries, _), axes = plan.allowed.shape, len(plan.spans)
    index = torch.zeros((), dtype=torch.long, device=plan.allowed.device)
    for axis, (offset, size) in enumerate(zip(plan.offsets, sizes, strict=True)):
        view = [1] * axes
        view[axis] = -1
        index = index * size + (offset + origins[axis]).unflatten(-1, view)
    index = index.expand(kinds, queries, *plan.spans).flatten(2)
    entries = math.prod(sizes)
    index = pad(index, (plan.allowed.shape[2] - index.shape[2], 0), value=entries)
    return index.masked_fill(~plan.allowed, entries + 1).flatten()


def _may_hide(bias: object) -> bool:
    """Return whether a bias may hide keys by ``-inf``; looking is cheap on a CPU and stalls other devices."""
    if not isinstance(bias, (RelativeBias, AxialBias)):
        return False
    return any(tensor.device.type != "cpu" or bool(tensor.isneginf().any()) for tensor in tensors_of(bias))
