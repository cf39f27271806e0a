"""Attention by PyTorch's FlexAttention: a fused kernel compiled per pattern on a GPU, the whole matrix on a CPU.

The pattern's ``mask`` becomes the kernel's mask, and biases become its change of scores. On a CPU there is only a
forward pass, which forms every logit: it runs when asked for by name and serves to check masks and biases. The GPU path
has not run on a GPU yet.

Source: FlexAttention (arXiv 2412.05496); ``torch.nn.attention.flex_attention``.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from vislm.kernels.backends.fused_output import beyond_output
from vislm.kernels.patterns import Causal, Dense, GridPattern, Masked, Padded
from vislm.kernels.request import Answer, AttentionRequest

LEAST_HEAD_DIM = 16


def supports(request: AttentionRequest) -> str | None:
    """Return why FlexAttention cannot run the request; None = it can."""
    if not isinstance(request.pattern, (Dense, Causal, Padded, Masked, GridPattern)):
        return f"has no mask function for the pattern {type(request.pattern).__name__}"
    reason = beyond_output(request)
    if reason is not None:
        return reason
    device = request.shape.device.type
    if device == "cpu":
        return "FlexAttention has no backward on the CPU" if request.differentiable else None
    return _unsupported_on_gpu(request) if device == "cuda" else f"needs CUDA or CPU tensors, these are on {device}"


def only_when_forced(request: AttentionRequest) -> str | None:
    """Return why this backend waits to be asked for by name although it can run the request; None = it need not."""
    if request.shape.device.type == "cpu":
        return "forms the whole matrix on a CPU"
    additive = request.bias is not None or request.key_logits is not None
    if isinstance(request.pattern, (Dense, Causal)) and not additive and not request.statistics.lse:
        return "compiles what PyTorch's fused attention has ready-made"
    return None


def run(request: AttentionRequest) -> Answer:
    """Return the output, and the log-sum-exp and output norms if wanted, of a request that :func:`supports` accepts."""
    from vislm.kernels.backends.flex.call import attention

    return attention(request)


def _unsupported_on_gpu(request: AttentionRequest) -> str | None:
    if find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if request.dtype == torch.float64:
        return "computes in float32 on a GPU, these tensors are float64"
    assert request.value is not None
    least = min(request.query.shape[-1], request.value.shape[-1])
    return f"needs a head_dim of {LEAST_HEAD_DIM} or more, this is {least}" if least < LEAST_HEAD_DIM else None
