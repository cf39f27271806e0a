"""Gathering and merging of tokens by Triton kernels; :mod:`vislm.kernels.tokens` calls them for CUDA tensors.

Sums run over the tokens of each destination in their order: no atomic additions, so results repeat bit for bit. Nothing
here has run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from vislm.kernels.backends.triton.launching import launch
from vislm.kernels.backends.triton.tokens.kernels import combine_backward_kernel, combine_kernel, gather_kernel

ROWS, MAX_CHANNELS, WARPS = 8, 256, 4


def fused_gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Return the tokens ``(B, K, C)`` at ``index`` ``(B, K)``, zeros for indices outside; differentiable."""
    return _Gather.apply(tokens, index)  # pyright: ignore[reportReturnType]


def fused_combine(tokens: Tensor, weights: Tensor | None, index: Tensor, num_rows: int) -> Tensor:
    """Return ``(B, num_rows, C)``: the tokens times their ``weights`` ``(B, N)`` added up at ``index`` ``(B, N)``.

    Differentiable in tokens and weights. Additions are made in float32, in a fixed order.
    """
    return _Combine.apply(tokens, weights, index, num_rows)  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_tokens = tokens.shape[1]
        return _gathered(tokens, index)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _combined(grad, None, index, ctx.num_tokens), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor | None, index: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(tokens, weights, index)
        return _combined(tokens, weights, index, num_rows)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, weights, index = ctx.saved_tensors
        if weights is None:
            return _gathered(grad, index), None, None, None
        return *_combined_backward(tokens, weights, index, grad), None, None


def _gathered(tokens: Tensor, index: Tensor) -> Tensor:
    batch, num_rows = index.shape
    tokens = _rows(tokens)
    output = tokens.new_empty(batch, num_rows, tokens.shape[2])
    channels = _channels(tokens)
    arguments = {
        "tokens": tokens,
        "index": index.contiguous(),
        "output": output,
        "token_strides": tokens.stride()[:2],
        "num_tokens": tokens.shape[1],
        "num_rows": num_rows,
        "channels": tokens.shape[2],
        "ROWS": ROWS,
        "CHANNELS": channels,
    }
    programs = batch * triton.cdiv(num_rows, ROWS) * triton.cdiv(tokens.shape[2], channels)
    launch(gather_kernel, programs, arguments, WARPS, 1)
    return output


def _combined(tokens: Tensor, weights: Tensor | None, index: Tensor, num_rows: int) -> Tensor:
    batch, num_tokens, width = tokens.shape
    tokens = _rows(tokens)
    output = tokens.new_empty(batch, num_rows, width)
    goes, order = torch.sort(index, dim=1, stable=True)
    rows = torch.arange(num_rows + 1, device=index.device, dtype=index.dtype).expand(batch, -1).contiguous()
    channels = _channels(tokens)
    arguments = {
        "tokens": tokens,
        "weights": None if weights is None else weights.contiguous(),
        "order": order.to(torch.int32),
        "starts": torch.searchsorted(goes, rows, out_int32=True),
        "output": output,
        "token_strides": tokens.stride()[:2],
        "num_tokens": num_tokens,
        "num_rows": num_rows,
        "channels": width,
        "ROWS": ROWS,
        "CHANNELS": channels,
    }
    launch(combine_kernel, batch * num_rows * triton.cdiv(width, channels), arguments, WARPS, 1)
    return output


def _combined_backward(tokens: Tensor, weights: Tensor, index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_tokens, width = tokens.shape
    tokens, grad = _rows(tokens), _rows(grad)
    grad_tokens = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    grad_weights = weights.new_empty(weights.shape)
    arguments = {
        "tokens": tokens,
        "weights": weights.contiguous(),
        "index": index.contiguous(),
        "grad": grad,
        "grad_tokens": grad_tokens,
        "grad_weights": grad_weights,
        "token_strides": tokens.stride()[:2],
        "grad_strides": grad.stride()[:2],
        "num_tokens": num_tokens,
        "num_rows": grad.shape[1],
        "channels": width,
        "ROWS": ROWS,
        "CHANNELS": _channels(tokens),
    }
    launch(combine_backward_kernel, batch * triton.cdiv(num_tokens, ROWS), arguments, WARPS, 1)
    return grad_tokens, grad_weights


def _channels(tokens: Tensor) -> int:
    return min(MAX_CHANNELS, triton.next_power_of_2(max(1, tokens.shape[2])))


def _rows(tensor: Tensor) -> Tensor:
    """Return the tensor with neighbouring channels, as the kernels read them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
