"""Forward and backward pass over the tiles; the backward pass computes the weights again instead of keeping them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vislm.kernels.local.tiles import (
    Chunk,
    Settings,
    Tensors,
    axial_index,
    chunks,
    from_query_tiles,
    key_index,
    key_tiles,
    logits_of,
    lse_of,
    of_chunk,
    query_tiles,
    weights_of,
)
from vislm.kernels.scratch import Scratch, scratch_for


class LocalAttention(torch.autograd.Function):
    """``output (X, G, Nq, Dv)`` and log-sum-exp ``(X, G, Nq)`` of a grid's queries; see :class:`Tensors`.

    The log-sum-exp is empty unless the settings want it.
    """

    @staticmethod
    def forward(ctx: Any, settings: Settings, *given: Any) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp."""
        query_of, key_of, value_of, additive, key_logits, *axial = given
        tensors = Tensors(query_of, key_of, value_of, additive, key_logits, tuple(axial))
        plan, dtype = settings.plan, settings.dtype
        scratch = scratch_for(tensors.query, dtype)
        query = query_tiles(tensors.query, plan, scratch, "query")
        outputs = scratch.take("outputs", *query.shape[:-1], tensors.value.shape[-1])
        sums = scratch.take("sums", *query.shape[:-1])
        for chunk in chunks(tensors, plan):
            key = key_tiles(tensors.key, chunk, plan, scratch, "key")
            logits = logits_of(of_chunk(query, chunk), key, chunk, tensors, settings, scratch)
            weights = weights_of(logits, chunk, settings, scratch)
            value = key_tiles(tensors.value, chunk, plan, scratch, "value")
            torch.bmm(weights, value, out=of_chunk(outputs, chunk))
            if settings.wants_lse:
                place = sums[chunk.heads, chunk.tiles]
                place.copy_(lse_of(logits, weights).view(place.shape))
        output = from_query_tiles(outputs, plan).to(tensors.query.dtype)
        lse = from_query_tiles(sums, plan) if settings.wants_lse else output.new_empty(0, dtype=dtype)
        ctx.settings = settings
        ctx.save_for_backward(*given, output)
        if not settings.wants_lse:
            ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - once_differentiable wraps it
        """Return the gradients of all tensors."""
        grad_output, grad_lse = grad_outputs
        query_of, key_of, value_of, additive, key_logits, *axial, output = ctx.saved_tensors
        settings: Settings = ctx.settings
        tensors = Tensors(query_of, key_of, value_of, additive, key_logits, tuple(axial))
        plan, dtype = settings.plan, settings.dtype
        scratch = scratch_for(tensors.query, dtype)
        query = query_tiles(tensors.query, plan, scratch, "query")
        above = query_tiles(grad_output, plan, scratch, "above")
        above *= plan.real[:, None, :, None]  # what repeated queries give does not count
        # The sum of weight times slope of each row, which is the same over keys as over channels.
        delta = (grad_output.to(dtype) * output.to(dtype)).sum(-1, keepdim=True)
        if settings.wants_lse:
            delta = delta - grad_lse[..., None]
        delta = query_tiles(delta, plan, scratch, "delta") * plan.real[:, None, :, None]
        to_query = scratch.take("to_query", *query.shape)
        to_key = torch.zeros(tensors.key.shape, dtype=dtype, device=query.device)
        to_value = torch.zeros(tensors.value.shape, dtype=dtype, device=query.device)
        to_bias = _BiasGradients(tensors, settings, ctx.needs_input_grad[4:])
        for chunk in chunks(tensors, plan):
            mine, key = of_chunk(query, chunk), key_tiles(tensors.key, chunk, plan, scratch, "key")
            value = key_tiles(tensors.value, chunk, plan, scratch, "value")
            logits = logits_of(mine, key, chunk, tensors, settings, scratch)
            weights = weights_of(logits, chunk, settings, scratch)
            grad = of_chunk(above, chunk)
            slope = torch.bmm(grad, value.transpose(1, 2), out=scratch.take("slope", *logits.shape))
            if settings.normalize == "softmax":
                slope.sub_(of_chunk(delta, chunk)).mul_(weights)
            else:
                slope.mul_(_sigmoid_slope(logits, weights, settings))
            torch.bmm(slope, key, out=of_chunk(to_query, chunk))
            index = key_index(chunk, tensors.key.shape[1], plan)
            _scatter(to_key, index, slope, mine, scratch)
            _scatter(to_value, index, weights, grad, scratch)
            to_bias.add(slope, chunk)
        return (
            None,
            from_query_tiles(to_query.mul_(settings.scale), plan).to(tensors.query.dtype),
            to_key.mul_(settings.scale).to(tensors.key.dtype),
            to_value.to(tensors.value.dtype),
            *to_bias.gradients(),
        )


def _scatter(total: Tensor, index: Tensor, by_key: Tensor, rows: Tensor, scratch: Scratch) -> None:
    """Add ``by_key^T rows`` of each tile, ``(x t, P + S, C)``, to the tokens ``(X, Nk, C)`` of its keys."""
    tiles = scratch.take("to_keys", by_key.shape[0], by_key.shape[2], rows.shape[2])
    torch.bmm(by_key.transpose(1, 2), rows, out=tiles)
    total.view(-1, total.shape[-1]).index_add_(0, index, tiles.flatten(0, 1))


def _sigmoid_slope(logits: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Return the derivative of the weights: ``exp(temperature) w (1 - sigmoid)``, w with its row's factor."""
    normalize = settings.normalize
    assert normalize != "softmax"
    assert normalize.bias is not None
    factor = math.exp(normalize.temperature)
    return weights * (1 - torch.sigmoid(logits * factor + normalize.bias)) * factor


class _BiasGradients:
    """The gradients of additive, key logits and axial logits, summed over the chunks; None where not needed."""

    def __init__(self, tensors: Tensors, settings: Settings, needed: tuple[bool, ...]) -> None:
        self._settings = settings
        self._given = (tensors.additive, tensors.key_logits, *tensors.axial)
        self._sums = [
            torch.zeros_like(tensor, dtype=settings.dtype, memory_format=torch.contiguous_format)
            if need and tensor is not None
            else None
            for tensor, need in zip(self._given, needed, strict=True)
        ]

    def add(self, slope: Tensor, chunk: Chunk) -> None:
        """Add what the slopes ``(x t, G Q, P + S)`` of a chunk's logits give."""
        plan = self._settings.plan
        index = plan.queries[chunk.tiles]
        tiled = slope.view(chunk.heads.stop - chunk.heads.start, len(index), -1, index.shape[1], slope.shape[-1])
        additive, key_logits, *axial = self._sums
        heads = range(chunk.heads.start, chunk.heads.stop)
        if additive is not None:
            grouped = tiled.sum(2, keepdim=True) if additive.shape[2] == 1 else tiled
            for head, mine in zip(heads, grouped, strict=True):
                additive[head % len(additive)].index_add_(0, plan.kind[chunk.tiles], mine)
        if key_logits is not None:
            of_keys = tiled.sum(3).transpose(1, 2).flatten(2)
            key_logits[chunk.heads].index_add_(2, plan.keys[chunk.tiles].flatten(), of_keys)
        if not any(total is not None for total in axial):
            return
        by_axis = (tiled @ plan.selector.to(tiled.dtype).t()).split(plan.spans, dim=-1)
        for axis, (total, along) in enumerate(zip(axial, by_axis, strict=True)):
            if total is None:
                continue
            entries = torch.zeros(*along.shape[:4], total.shape[-1], dtype=total.dtype, device=total.device)
            entries.scatter_add_(-1, axial_index(chunk, axis, self._settings).expand_as(along), along)
            real = entries * plan.real[chunk.tiles][:, None, :, None]
            total[chunk.heads].index_add_(2, index.flatten(), real.transpose(1, 2).flatten(2, 3))

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the sums in the dtypes of their tensors."""
        pairs = zip(self._sums, self._given, strict=True)
        return tuple(None if total is None or given is None else total.to(given.dtype) for total, given in pairs)
