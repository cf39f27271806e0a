"""Fused neighborhood attention as one differentiable function of its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vislm.kernels.backends.triton.neighborhood.operands import (
    Operands,
    launch_backward_key,
    launch_backward_query,
    launch_forward,
)
from vislm.kernels.patterns.grid import GridPattern

_OPTIONS, _TENSORS = 3, 5


def neighborhood_attention(operands: Operands) -> tuple[Tensor, Tensor]:
    """Return the output ``(B, Hq, Nq, Dv)`` and the log-sum-exp ``(B, Hq, Nq)``, natural and in float32.

    Both are differentiable, once, with respect to every tensor. A query that sees no key has output 0 and log-sum-exp
    ``-inf``.
    """
    options = (operands.pattern, operands.origins, operands.scale)
    tensors = (operands.query, operands.key, operands.value, operands.table, operands.key_logits)
    output, lse = _NeighborhoodAttention.apply(*options, *tensors, *operands.axial)
    return output, lse


class _NeighborhoodAttention(torch.autograd.Function):
    """The kernels under autograd; the log-sum-exp has a gradient too, so that attentions can be merged."""

    @staticmethod
    def forward(
        ctx: Any, pattern: GridPattern, origins: tuple[int, ...], scale: float, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.options = (origins, pattern, scale)
        output, lse = launch_forward(_operands(tensors, ctx.options))
        ctx.save_for_backward(*tensors, output, lse)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, output, lse = ctx.saved_tensors
        operands = _operands(tensors, ctx.options)
        grad_output = torch.zeros_like(output) if grad_output is None else _rows(grad_output)
        needs = ctx.needs_input_grad[_OPTIONS:]
        delta, grad_query, grad_table, grad_axial = launch_backward_query(
            operands,
            output,
            lse,
            grad_output,
            None if grad_lse is None else grad_lse.contiguous(),
            needs_bias=needs[3] or any(needs[_TENSORS:]),
        )
        grad_key, grad_value, grad_key_logits = launch_backward_key(
            operands, lse, delta, grad_output, needs_key_logits=needs[4]
        )
        if grad_key_logits is not None and operands.key_logits is not None:
            grad_key_logits = grad_key_logits.sum_to_size(operands.key_logits.shape)
        axial = grad_axial or (None,) * len(operands.axial)
        grads = (grad_query, grad_key, grad_value, grad_table, grad_key_logits, *axial)
        typed = (None if grad is None else grad.to(given.dtype) for grad, given in zip(grads, tensors, strict=True))
        return (None,) * _OPTIONS + tuple(typed)


def _rows(tensor: Tensor) -> Tensor:
    """Return the tensor with neighbouring channels, as the kernels read them; a copy only if need be."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _operands(
    tensors: tuple[Tensor | None, ...] | list[Tensor], options: tuple[tuple[int, ...], GridPattern, float]
) -> Operands:
    query, key, value, table, key_logits, *axial = tensors
    assert query is not None
    assert key is not None
    assert value is not None
    return Operands(query, key, value, table, tuple(a for a in axial if a is not None), key_logits, *options)
