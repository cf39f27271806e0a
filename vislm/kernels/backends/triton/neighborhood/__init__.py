"""Neighborhood, blocked and window attention on 1-D, 2-D and 3-D grids by fused kernels, forward and backward.

A tile of queries meets the keys of the box that its windows touch, so that memory is O(N) and work is proportional to
the window. Prefix tokens are joined by the dense kernels. Nothing here has run on a GPU yet.

Source of the idea: FNA (arXiv 2403.04690), GNA (2504.16922); https://github.com/SHI-Labs/NATTEN.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vislm.kernels.bias import AxialBias, RelativeBias, tensors_of
from vislm.kernels.merging import merge
from vislm.kernels.patterns import Dense, Padded, Pattern
from vislm.kernels.patterns.grid import GridPattern
from vislm.kernels.request import Answer, AttentionRequest
from vislm.kernels.tiled_statistics import tiled_statistics

if TYPE_CHECKING:
    from vislm.kernels.backends.triton.neighborhood.operands import Operands

MAX_HEAD_DIM = 256
MAX_FLOAT32_TRAINING = 64
_MIN_CHANNELS = 16


def supports_neighborhood(request: AttentionRequest) -> str | None:
    """Return why these kernels cannot run a request on a grid for which Triton is available; None = they can."""
    if request.normalize != "softmax":
        return "has no sigmoid attention on a grid"
    if isinstance(request.bias, Tensor):
        return "has no dense bias on a grid"
    additive = [tensor for tensor in (*tensors_of(request.bias), request.key_logits) if tensor is not None]
    if any(tensor.dtype == torch.float64 for tensor in additive):
        return "has no float64 kernels, and the additive logits are float64"
    width = max(request.query.shape[-1], 0 if request.value is None else request.value.shape[-1])
    if width > MAX_HEAD_DIM:
        return f"has kernels for head_dim up to {MAX_HEAD_DIM}, this is {width}"
    if request.differentiable and request.query.dtype == torch.float32 and width > MAX_FLOAT32_TRAINING:
        return f"has float32 gradients for head_dim up to {MAX_FLOAT32_TRAINING}, this is {width}"
    wanted = request.statistics
    received = wanted.received or wanted.received_where is not None
    flags = {
        "received": received,
        "mass": wanted.mass is not None,
        "entropy": wanted.entropy,
        "maximum": wanted.maximum,
    }
    unfit = [name for name, flag in flags.items() if flag]
    if unfit:
        return f"has no kernel for {', '.join(unfit)} on a grid"
    adds = request.differentiable and any(tensor.requires_grad for tensor in tensors_of(request.bias))
    if adds and torch.are_deterministic_algorithms_enabled():
        return "adds the gradients of a bias in any order, which torch.use_deterministic_algorithms forbids"
    return None


def run_neighborhood(request: AttentionRequest) -> Answer:
    """Return the output and the statistics of a request that :func:`supports_neighborhood` accepts."""
    from vislm.kernels.backends.triton.neighborhood.autograd import neighborhood_attention

    wanted = request.statistics
    rows = replace(request, statistics=replace(wanted, lse=False))
    if request.value is None and not wanted.lse:
        return Answer(None, tiled_statistics(rows, None))
    pattern = request.pattern
    assert isinstance(pattern, GridPattern)
    output, lse = neighborhood_attention(_operands(request, pattern))
    if pattern.prefix:
        output, lse = _with_prefix(request, pattern, output, lse)
    kept = None if request.value is None else output
    return Answer(kept, replace(tiled_statistics(rows, kept), lse=lse if wanted.lse else None))


def _operands(request: AttentionRequest, pattern: GridPattern) -> Operands:
    """Return the call without its prefix tokens, in the layout of the kernels."""
    from vislm.kernels.backends.triton.neighborhood.operands import Operands

    prefix, bias, key_logits = pattern.prefix, request.bias, request.key_logits
    return Operands(
        query=_rows(request.query[:, :, -math.prod(pattern.query_grid) :]),
        key=_rows(request.key[:, :, prefix:]),
        value=_rows(_value(request)[:, :, prefix:]),
        table=bias.table.contiguous() if isinstance(bias, RelativeBias) else None,
        axial=tuple(logits.contiguous() for logits in bias.logits) if isinstance(bias, AxialBias) else (),
        key_logits=None if key_logits is None else _rows(key_logits[:, :, 0, prefix:]),
        origins=bias.origins if isinstance(bias, (RelativeBias, AxialBias)) else (0,) * len(pattern.grid),
        pattern=pattern,
        scale=request.scale,
    )


def _rows(tensor: Tensor) -> Tensor:
    """Return the tensor with neighbouring channels, as the kernels read them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _with_prefix(request: AttentionRequest, pattern: GridPattern, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of all queries: those of the grid also see the prefix keys, the others see all."""
    prefix, on_grid, num_keys = pattern.prefix, output.shape[2], request.shape.num_keys
    merged, merged_lse = merge([_dense(request, slice(-on_grid, None), slice(prefix), Dense()), (output, lse)])
    if request.shape.num_queries == on_grid:
        return merged, merged_lse
    seen: Pattern = Dense()
    if any(pattern.margin):  # the zero keys around a grid are for the pattern to show or to hide
        place = torch.full((1, 1), num_keys - prefix - on_grid, device=output.device)
        visible = pattern.mask(place, torch.arange(num_keys, device=output.device)[None])
        seen = Padded(visible.expand(request.shape.batch, -1))
    first, first_lse = _dense(request, slice(prefix), slice(None), seen)
    return torch.cat((first, merged), dim=2), torch.cat((first_lse, merged_lse), dim=2)


def _dense(request: AttentionRequest, queries: slice, keys: slice, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Return attention between slices of the tokens, without bias, which prefix tokens do not have."""
    from vislm.kernels.backends.triton.dense import run_dense

    answer = run_dense(
        replace(
            request,
            query=request.query[:, :, queries],
            key=request.key[:, :, keys],
            value=_value(request)[:, :, keys],
            pattern=pattern,
            bias=None,
            key_logits=None if request.key_logits is None else request.key_logits[..., keys],
            statistics=replace(request.statistics, lse=True, rows=None, received_queries=None, output_norm=False),
        )
    )
    assert answer.output is not None
    assert answer.statistics.lse is not None
    return answer.output, answer.statistics.lse


def _value(request: AttentionRequest) -> Tensor:
    """Return the value, or zeros where only the log-sum-exp is wanted."""
    if request.value is not None:
        return request.value
    return request.key.new_zeros(1, 1, 1, _MIN_CHANNELS).expand(*request.key.shape[:3], -1)
