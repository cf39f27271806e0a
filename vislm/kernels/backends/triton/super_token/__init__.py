"""Super-token association by Triton kernels; :mod:`vislm.kernels.super_token` calls them for CUDA tensors.

Three kernels, each the derivative of the other two, are all that forward and backward need. Nothing here has run on a
GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vislm.kernels.backends.triton.availability import interpreted
from vislm.kernels.backends.triton.launching import launch
from vislm.kernels.backends.triton.super_token.kernels import products_kernel, spreads_kernel, sums_kernel
from vislm.kernels.super_token_cells import CellGrid

MAX_TOKENS, MAX_CHANNELS, WARPS = 32, 64, 4
_OPERANDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def fused_association(tokens: Tensor, centres: Tensor, cells: CellGrid, scale: float) -> Tensor:
    """Return ``softmax_o(scale x_n . s_m(n,o))``, ``(B, N, 9)`` in float32; differentiable."""
    return _Association.apply(tokens, centres, cells, scale)  # pyright: ignore[reportReturnType]


def fused_sums(tokens: Tensor, weights: Tensor, cells: CellGrid) -> Tensor:
    """Return ``sum_no w_no x_n`` over the pairs with ``m(n,o) = m``, ``(B, M, C)`` in float32; differentiable."""
    return _Sums.apply(tokens, weights, cells)  # pyright: ignore[reportReturnType]


def fused_spreads(centres: Tensor, weights: Tensor, cells: CellGrid) -> Tensor:
    """Return ``sum_o w_no s_m(n,o)``, ``(B, N, C)`` in the dtype of ``centres``; differentiable."""
    return _Spreads.apply(centres, weights, cells)  # pyright: ignore[reportReturnType]


class _Association(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, centres: Tensor, cells: CellGrid, scale: float) -> Tensor:
        association = _products(tokens, centres, cells, scale, softmax=True)
        ctx.save_for_backward(tokens, centres, association)
        ctx.options = (cells, scale)
        return association

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, centres, association = ctx.saved_tensors
        cells, scale = ctx.options
        grad_logits = scale * association * (grad - (association * grad).sum(-1, keepdim=True))
        grad_tokens = _spreads(centres, grad_logits, cells, tokens.dtype)
        return grad_tokens, _sums(tokens, grad_logits, cells, centres.dtype), None, None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, cells: CellGrid) -> Tensor:
        ctx.save_for_backward(tokens, weights)
        ctx.cells = cells
        return _sums(tokens, weights, cells, torch.float32)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, weights = ctx.saved_tensors
        needs_tokens, needs_weights, _ = ctx.needs_input_grad
        grad_tokens = _spreads(grad, weights, ctx.cells, tokens.dtype) if needs_tokens else None
        return grad_tokens, _products(tokens, grad, ctx.cells).to(weights.dtype) if needs_weights else None, None


class _Spreads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centres: Tensor, weights: Tensor, cells: CellGrid) -> Tensor:
        ctx.save_for_backward(centres, weights)
        ctx.cells = cells
        return _spreads(centres, weights, cells, centres.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        centres, weights = ctx.saved_tensors
        needs_centres, needs_weights, _ = ctx.needs_input_grad
        grad_centres = _sums(grad, weights, ctx.cells, centres.dtype) if needs_centres else None
        return grad_centres, _products(grad, centres, ctx.cells).to(weights.dtype) if needs_weights else None, None


def _products(tokens: Tensor, centres: Tensor, cells: CellGrid, scale: float = 1.0, *, softmax: bool = False) -> Tensor:
    output = tokens.new_empty(*tokens.shape[:2], 9, dtype=torch.float32)
    blocks, sizes = _tiling(cells, tokens.shape[2])
    arguments = {
        "tokens": tokens.contiguous(),
        "centres": centres.contiguous(),
        "products": output,
        "scale": float(scale),
        "channels": tokens.shape[2],
        "OPERAND": _operand(torch.promote_types(tokens.dtype, centres.dtype)),
        "SOFTMAX": softmax,
    }
    launch(
        products_kernel,
        len(tokens) * cells.rows * cells.columns * blocks,
        arguments | cells._asdict() | sizes,
        WARPS,
        2,
    )
    return output


def _spreads(centres: Tensor, weights: Tensor, cells: CellGrid, dtype: torch.dtype) -> Tensor:
    channels = centres.shape[2]
    output = centres.new_empty(*weights.shape[:2], channels, dtype=dtype)
    blocks, sizes = _tiling(cells, channels)
    arguments = {
        "centres": centres.contiguous(),
        "weights": weights.contiguous(),
        "output": output,
        "channels": channels,
    }
    programs = len(centres) * cells.rows * cells.columns * blocks * triton.cdiv(channels, sizes["CHANNELS"])
    launch(spreads_kernel, programs, arguments | cells._asdict() | sizes, WARPS, 1)
    return output


def _sums(tokens: Tensor, weights: Tensor, cells: CellGrid, dtype: torch.dtype) -> Tensor:
    channels = tokens.shape[2]
    output = tokens.new_empty(len(tokens), cells.rows * cells.columns, channels, dtype=dtype)
    _, sizes = _tiling(cells, channels)
    arguments = {"tokens": tokens.contiguous(), "weights": weights.contiguous(), "output": output, "channels": channels}
    programs = len(tokens) * cells.rows * cells.columns * triton.cdiv(channels, sizes["CHANNELS"])
    launch(sums_kernel, programs, arguments | cells._asdict() | sizes, WARPS, 1)
    return output


def _operand(dtype: torch.dtype) -> tl.dtype:
    """Return what is multiplied; Triton's interpreter takes the bits of bfloat16 for integers."""
    return tl.float32 if interpreted() else _OPERANDS[dtype]


def _tiling(cells: CellGrid, channels: int) -> tuple[int, dict[str, int]]:
    """Return the blocks of tokens per cell, and the sizes of a block."""
    place = cells.height * cells.width
    tokens = max(16, min(MAX_TOKENS, triton.next_power_of_2(place)))
    width = max(16, min(MAX_CHANNELS, triton.next_power_of_2(channels)))
    return triton.cdiv(place, tokens), {"TOKENS": tokens, "CHANNELS": width}
