"""One dense call as its kernels see it: plain tensors, a few numbers, and the arguments that every kernel shares."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vislm.kernels.backends.triton.availability import interpreted
from vislm.kernels.backends.triton.dense.tiles import DenseTile, dense_tile
from vislm.kernels.backends.triton.launching import launch
from vislm.kernels.normalization import Sigmoid
from vislm.kernels.patterns import Causal, Padded
from vislm.kernels.request import AttentionRequest

LOG2E = 1.4426950408889634
MIN_CHANNELS = 16


class Call(NamedTuple):
    """What is not a tensor.

    Attributes:
        causal: whether a query sees only keys up to its own position.
        scale: factor of the dot products.
        factor: factor of all logits before the normalisation, 1 for softmax.
        offset: added to the logits of sigmoid attention; None = softmax.
    """

    causal: bool
    scale: float
    factor: float = 1.0
    offset: float | None = None

    @property
    def sigmoid(self) -> bool:
        """Whether the weights are sigmoids."""
        return self.offset is not None


class Operands(NamedTuple):
    """The tensors: query, key and value ``(B, H, N, D)``, ``bias`` ``(1 or B, 1 or Hq, Nq, Nk)``, ``key_logits``
    float32 ``(1 or B, 1 or Hq, Nk)``; the last axis of each, but for the bias, has stride 1."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    key_logits: Tensor | None


def prepared(request: AttentionRequest) -> tuple[Call, Operands]:
    """Return the call and its operands; differentiable. Without ``value`` a value of zeros stands in."""
    pattern, normalize = request.pattern, request.normalize
    causal = isinstance(pattern, Causal) or (isinstance(pattern, Padded) and pattern.causal)
    call = Call(causal, request.scale)
    if isinstance(normalize, Sigmoid):
        assert normalize.bias is not None  # filled in when the call was checked
        call = Call(causal, request.scale, math.exp(normalize.temperature), normalize.bias)
    num_queries, num_keys = request.shape.num_queries, request.shape.num_keys
    bias = request.bias
    assert bias is None or isinstance(bias, Tensor)
    key_logits = None if request.key_logits is None else request.key_logits[:, :, 0].float()
    if bias is not None and bias.shape[2] == 1:  # one number per key
        row = bias[:, :, 0].float().expand(-1, -1, num_keys)
        bias, key_logits = None, row if key_logits is None else row + key_logits
    elif bias is not None:
        bias = bias.expand(-1, -1, num_queries, num_keys)
    if isinstance(pattern, Padded):
        hidden = ~pattern.valid[:, None]
        if key_logits is None:
            key_logits = torch.zeros(hidden.shape, device=hidden.device)
        key_logits = key_logits.masked_fill(hidden, -torch.inf)
    value = request.value
    if value is None:
        value = request.key.new_zeros(1, 1, 1, MIN_CHANNELS).expand(*request.key.shape[:3], -1)
    return call, Operands(_rows(request.query), _rows(request.key), _rows(value), bias, _rows(key_logits))


def shared_arguments(call: Call, operands: Operands) -> dict[str, Any]:
    """Return the arguments that have the same name and meaning in every dense kernel, but for the value."""
    query, key, _, bias, key_logits = operands
    batch, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    unit = LOG2E * call.factor
    return {
        "query": query,
        "key": key,
        "bias": bias,
        "key_logits": key_logits,
        "query_strides": query.stride()[:3],
        "key_strides": key.stride()[:3],
        "bias_strides": _strides(bias, (batch, num_heads, num_queries, num_keys)),
        "key_logits_strides": _strides(key_logits, (batch, num_heads, num_keys)),
        "num_heads": num_heads,
        "group": num_heads // key.shape[1],
        "num_queries": num_queries,
        "num_keys": num_keys,
        "scale": call.scale * unit,
        "unit": unit,
        "offset": 0.0 if call.offset is None else call.offset * LOG2E,
        "CAUSAL": call.causal,
        "SIGMOID": call.sigmoid,
        "DIM": head_dim,
        "PADDED_DIM": padded(head_dim),
        "PRECISION": precision(query.dtype),
    }


def value_arguments(value: Tensor) -> dict[str, Any]:
    """Return the arguments about the value that the forward and the backward kernels share."""
    return {
        "value": value,
        "value_strides": value.stride()[:3],
        "VALUE_DIM": value.shape[-1],
        "PADDED_VALUE_DIM": padded(value.shape[-1]),
    }


def padded(channels: int) -> int:
    """Return the width of a tile that holds ``channels``: a power of two, 16 at least."""
    return max(MIN_CHANNELS, triton.next_power_of_2(channels))


def precision(dtype: torch.dtype) -> str:
    """Return how the kernels multiply numbers of a dtype; see :func:`dense_tile.product`."""
    if dtype == torch.float32:
        return "ieee"
    return "widened" if dtype == torch.bfloat16 and interpreted() else "tensor_cores"


def tile_of(kernel: str, operands: Operands) -> DenseTile:
    """Return the tile configuration of one kernel for these operands."""
    width = max(padded(operands.query.shape[-1]), padded(operands.value.shape[-1]))
    return dense_tile(kernel, width, operands.query.dtype, operands.bias is not None, operands.query.device)


def start(kernel: Any, programs: int, tile: DenseTile, arguments: dict[str, Any]) -> None:
    """Launch a kernel with its tile configuration."""
    launch(kernel, programs, arguments | tile.constants, tile.num_warps, tile.num_stages)


def _strides(tensor: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.expand(shape).stride()


def _rows(tensor: Tensor | None) -> Any:
    """Return the tensor with stride 1 along its last axis."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
