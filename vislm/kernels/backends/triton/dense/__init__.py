"""Dense, causal and padded attention by fused kernels, forward and backward, with statistics.

Key padding and key logits reach the kernels as one additive number per key. Memory is O(N) per head. Every gradient is
summed in a fixed order, so results repeat bit for bit. Products of float32 inputs are full float32, never TF32.

Source of the recurrence: FlashAttention-2 (arXiv 2307.08691; https://github.com/Dao-AILab/flash-attention).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vislm.kernels.normalization import Sigmoid
from vislm.kernels.patterns import Causal, Dense, Padded
from vislm.kernels.request import Answer, AttentionRequest, CheckedStatistics
from vislm.kernels.statistics import Statistics
from vislm.kernels.tiled_statistics import with_chosen

if TYPE_CHECKING:
    from vislm.kernels.backends.triton.dense.call import Call, Operands

MAX_HEAD_DIM = 256
MAX_FLOAT32_TRAINING = 128
_LN2 = 0.6931471805599453


def supports_dense(request: AttentionRequest) -> str | None:
    """Return why these kernels cannot run a request for which Triton is available; None = they can."""
    if not isinstance(request.pattern, (Dense, Causal, Padded)):
        return f"has no kernel for the pattern {type(request.pattern).__name__}"
    if request.bias is not None and not isinstance(request.bias, Tensor):
        return f"has no kernel for {type(request.bias).__name__} without a grid"
    additive = (request.bias, request.key_logits)
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in additive):
        return "has no float64 kernels, and the additive logits are float64"
    width = max(request.query.shape[-1], 0 if request.value is None else request.value.shape[-1])
    if width > MAX_HEAD_DIM:
        return f"has kernels for head_dim up to {MAX_HEAD_DIM}, this is {width}"
    if request.differentiable and request.query.dtype == torch.float32 and width > MAX_FLOAT32_TRAINING:
        return f"has float32 gradients for head_dim up to {MAX_FLOAT32_TRAINING}, this is {width}"
    wanted = _fused(request.statistics)
    if request.differentiable and wanted:
        return f"has no gradients of {', '.join(wanted)}; use torch.no_grad() if none are needed"
    return None


def run_dense(request: AttentionRequest) -> Answer:
    """Return the output and the statistics of a request that :func:`supports_dense` accepts."""
    from vislm.kernels.backends.triton.dense.autograd import DenseAttention
    from vislm.kernels.backends.triton.dense.call import prepared

    wanted = request.statistics
    if request.value is None and not wanted.lse and not _fused(wanted):  # a few rows at most
        return Answer(None, with_chosen(Statistics(), request, None))
    call, operands = prepared(request)
    output, log_sum = DenseAttention.apply(call, *operands)
    factor = _row_factor(request)
    if factor is not None:
        output = (output * factor[:, None]).to(output.dtype)
    output = None if request.value is None else output
    measured = _measured(wanted, call, operands, log_sum.detach(), factor)
    if wanted.lse:
        measured = replace(measured, lse=log_sum * _LN2)
    return Answer(output, with_chosen(measured, request, output))


def _fused(wanted: CheckedStatistics) -> list[str]:
    """Return the names of the wanted statistics that the fused kernels compute, which have no gradient."""
    received = wanted.received or wanted.received_where is not None
    flags = {
        "received": received,
        "mass": wanted.mass is not None,
        "entropy": wanted.entropy,
        "maximum": wanted.maximum,
    }
    return [name for name, flag in flags.items() if flag]


def _row_factor(request: AttentionRequest) -> Tensor | None:
    """Return what each query's weights are multiplied by, (Nq,); None = nothing."""
    if not isinstance(request.normalize, Sigmoid) or request.normalize.row_norm is None:
        return None
    _, _, num_queries, num_keys, device = request.shape
    length = (torch.arange(1, num_queries + 1, device=device) + num_keys - num_queries).clamp_min(1).float()
    return length.reciprocal() if request.normalize.row_norm == "length" else length.rsqrt()


def _measured(
    wanted: CheckedStatistics, call: Call, operands: Operands, log_sum: Tensor, factor: Tensor | None
) -> Statistics:
    """Return the statistics that the fused kernels compute; ``factor`` ``(Nq,)`` multiplies each query's weights."""
    from vislm.kernels.backends.triton.dense.measure import received_by_keys, row_statistics

    mass = entropy = maximum = received = None
    if wanted.mass is not None or wanted.entropy or wanted.maximum:
        mass, entropy, maximum = row_statistics(call, operands, log_sum, wanted)
    if factor is not None:
        mass = None if mass is None else {name: share * factor for name, share in mass.items()}
        maximum = None if maximum is None else maximum * factor
    if wanted.received or wanted.received_where is not None:
        counted = wanted.received_where
        if factor is not None:
            counted = factor[None] if counted is None else counted * factor
        received = received_by_keys(call, operands, log_sum, counted)
    return Statistics(received=received, mass=mass, entropy=entropy, maximum=maximum)
