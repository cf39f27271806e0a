"""Attention in Triton: fused kernels for NVIDIA cards, which Triton's interpreter also runs on a CPU (for tests).

Nothing here has run on a GPU yet. The kernels are compiled for sm_80, sm_90 and sm_100 by ``vislm bench gpu-audit``,
and their results are compared with the reference under the interpreter (``TRITON_INTERPRET=1``). Triton is imported
when the first call runs, not before.
"""

from __future__ import annotations

from vislm.kernels.backends.triton.availability import unavailable
from vislm.kernels.patterns.grid import GridPattern
from vislm.kernels.request import Answer, AttentionRequest


def supports(request: AttentionRequest) -> str | None:
    """Return why Triton cannot run the request; None = it can."""
    reason = unavailable(request)
    if reason is not None:
        return reason
    if isinstance(request.pattern, GridPattern):
        from vislm.kernels.backends.triton.neighborhood import supports_neighborhood

        return supports_neighborhood(request)
    from vislm.kernels.backends.triton.dense import supports_dense

    return supports_dense(request)


def run(request: AttentionRequest) -> Answer:
    """Compute a request that :func:`supports` accepts."""
    if isinstance(request.pattern, GridPattern):
        from vislm.kernels.backends.triton.neighborhood import run_neighborhood

        return run_neighborhood(request)
    from vislm.kernels.backends.triton.dense import run_dense

    return run_dense(request)
