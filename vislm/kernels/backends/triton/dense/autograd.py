"""Forward and backward of dense attention, from tensors to kernel launches."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from vislm.kernels.backends.triton.dense.backward import (
    backward_keys_kernel,
    backward_queries_kernel,
    delta_kernel,
)
from vislm.kernels.backends.triton.dense.backward_bias import backward_bias_kernel
from vislm.kernels.backends.triton.dense.call import (
    LOG2E,
    Call,
    Operands,
    padded,
    shared_arguments,
    start,
    tile_of,
    value_arguments,
)
from vislm.kernels.backends.triton.dense.forward import forward_kernel
from vislm.kernels.backends.triton.launching import launch


class DenseAttention(torch.autograd.Function):
    """``apply(call, query, key, value, bias, key_logits) -> (output, log_sum)``.

    ``output`` is ``(B, Hq, Nq, Dv)``, and ``log_sum`` the base-2 log-sum-exp ``(B, Hq, Nq)`` in float32, differentiable
    like the output (empty for sigmoid attention).
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        operands = Operands(*tensors)  # pyright: ignore[reportArgumentType]
        query, value = operands.query, operands.value
        batch, num_heads, num_queries, _ = query.shape
        # Heads next to each other, as the projection behind an attention wants them.
        output = query.new_empty(batch, num_queries, num_heads, value.shape[-1]).transpose(1, 2)
        log_sum = query.new_empty((0,) if call.sigmoid else query.shape[:3], dtype=torch.float32)
        tile = tile_of("forward", operands)
        arguments = shared_arguments(call, operands) | value_arguments(value)
        arguments |= {"output": output, "log_sum": log_sum, "output_strides": output.stride()[:3]}
        start(forward_kernel, batch * num_heads * triton.cdiv(num_queries, tile.rows), tile, arguments)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, output, log_sum)
        return output, log_sum

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor | None, log_sum_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, output, log_sum = ctx.saved_tensors
        operands, call = Operands(*tensors), ctx.call
        if gradient is None:
            gradient = torch.zeros_like(output)
        elif gradient.stride(-1) != 1:
            gradient = gradient.contiguous()
        delta = None if call.sigmoid else _delta(operands, output, gradient, log_sum, log_sum_gradient)
        arguments = shared_arguments(call, operands) | value_arguments(operands.value)
        arguments |= {
            "gradient": gradient,
            "log_sum": log_sum,
            "delta": log_sum if delta is None else delta,
            "gradient_strides": gradient.stride()[:3],
            "gradient_scale": call.scale * call.factor,
        }
        _, for_query, for_key, for_value, for_bias, for_key_logits = ctx.needs_input_grad
        to_query = _to_query(operands, arguments) if for_query else None
        to_key = to_value = to_key_logits = None
        if for_key or for_value or for_key_logits:
            to_key, to_value, to_key_logits = _to_keys(operands, arguments, call, for_key_logits)
        to_bias = _to_bias(operands, arguments, call) if for_bias else None
        return None, to_query, to_key, to_value, to_bias, to_key_logits


def _delta(
    operands: Operands, output: Tensor, gradient: Tensor, log_sum: Tensor, log_sum_gradient: Tensor | None
) -> Tensor:
    batch, num_heads, num_queries, _ = operands.query.shape
    delta = torch.empty_like(log_sum)
    if log_sum_gradient is not None:  # of the base-2 logarithm; the kernel takes the natural one's
        log_sum_gradient = (log_sum_gradient * LOG2E).contiguous()
    tile = tile_of("delta", operands)
    arguments = {
        "output": output,
        "gradient": gradient,
        "log_sum": log_sum,
        "log_sum_gradient": log_sum_gradient,
        "delta": delta,
        "output_strides": output.stride()[:3],
        "gradient_strides": gradient.stride()[:3],
        "num_heads": num_heads,
        "num_queries": num_queries,
        "VALUE_DIM": output.shape[-1],
        "PADDED_VALUE_DIM": padded(output.shape[-1]),
        "ROWS": tile.rows,
    }
    programs = batch * num_heads * triton.cdiv(num_queries, tile.rows)
    launch(delta_kernel, programs, arguments, tile.num_warps, tile.num_stages)
    return delta


def _to_query(operands: Operands, arguments: dict[str, Any]) -> Tensor:
    query = operands.query
    gradient = torch.empty_like(query)
    tile = tile_of("backward_queries", operands)
    programs = query.shape[0] * query.shape[1] * triton.cdiv(query.shape[2], tile.rows)
    extra = {"query_gradient": gradient, "query_gradient_strides": gradient.stride()[:3]}
    start(backward_queries_kernel, programs, tile, arguments | extra)
    return gradient


def _to_keys(
    operands: Operands, arguments: dict[str, Any], call: Call, for_key_logits: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of key, value and, if wanted, key logits."""
    key, value, shared = operands.key, operands.value, operands.key_logits
    to_key, to_value = torch.empty_like(key), torch.empty_like(value)
    to_logits = None
    if for_key_logits:
        to_logits = key.new_empty(*operands.query.shape[:2], key.shape[2], dtype=torch.float32)
    tile = tile_of("backward_keys", operands)
    extra = {
        "key_gradient": to_key,
        "value_gradient": to_value,
        "key_logits_gradient": to_logits,
        "key_gradient_strides": to_key.stride()[:3],
        "value_gradient_strides": to_value.stride()[:3],
    }
    programs = key.shape[0] * key.shape[1] * triton.cdiv(key.shape[2], tile.columns)
    start(backward_keys_kernel, programs, tile, arguments | extra)
    if to_logits is not None and shared is not None:
        to_logits = (to_logits * call.factor).sum_to_size(shared.shape)
    return to_key, to_value, to_logits


def _to_bias(operands: Operands, arguments: dict[str, Any], call: Call) -> Tensor:
    bias = operands.bias
    assert bias is not None
    samples, heads, num_queries, num_keys = bias.shape
    gradient = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    tile = tile_of("backward_bias", operands)
    extra = {
        "bias_gradient": gradient,
        "gradient_scale": call.factor,
        "bias_heads": heads,
        "shared_samples": operands.query.shape[0] // samples,
        "shared_heads": operands.query.shape[1] // heads,
    }
    tiles = triton.cdiv(num_queries, tile.rows) * triton.cdiv(num_keys, tile.columns)
    start(backward_bias_kernel, samples * heads * tiles, tile, arguments | extra)
    return gradient
