"""What the fused kernels of other packages share: they give a softmax output and its log-sum-exp, nothing else."""

from __future__ import annotations

from torch import Tensor

from vislm.kernels.request import Answer, AttentionRequest
from vislm.kernels.statistics import Statistics


def beyond_output(request: AttentionRequest) -> str | None:
    """Return what the request wants beyond a softmax output, its log-sum-exp and its norms; None = nothing."""
    if request.normalize != "softmax":
        return "has softmax only"
    if request.value is None:
        return "measures nothing without computing the output"
    if 0 in (*request.query.shape, *request.value.shape):
        return "has no kernel for empty tensors"
    wanted = request.statistics
    received = wanted.received or wanted.received_queries is not None or wanted.received_where is not None
    asked = {
        "rows": wanted.rows is not None,
        "received": received,
        "mass": wanted.mass is not None,
        "entropy": wanted.entropy,
        "maximum": wanted.maximum,
    }
    names = [name for name, is_asked in asked.items() if is_asked]
    return f"measures lse and output_norm only, not {', '.join(names)}" if names else None


def fused_answer(request: AttentionRequest, output: Tensor, lse: Tensor | None) -> Answer:
    """Return the answer of a kernel that gave ``output`` ``(B, Hq, Nq, Dv)`` and ``lse`` ``(B, Hq, Nq)``."""
    wanted = request.statistics
    statistics = Statistics(
        lse=lse if wanted.lse else None,
        output_norm=output.to(request.dtype).norm(dim=-1) if wanted.output_norm else None,
    )
    return Answer(output.to(request.query.dtype), statistics)
