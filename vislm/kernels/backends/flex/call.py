"""One call of FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from vislm.kernels.backends.flex.masks import block_mask
from vislm.kernels.backends.flex.scores import score_mod
from vislm.kernels.backends.fused_output import fused_answer
from vislm.kernels.request import Answer, AttentionRequest

# torch.compile gives a function 8 versions and then refuses; here each pattern, bias, dtype and device is a version.
VERSIONS = 1024


def attention(request: AttentionRequest) -> Answer:
    """Return the answer to a request that :func:`vislm.kernels.backends.flex.supports` accepts.

    Scores and their changes are float32 (float64 on a CPU for float64 inputs).
    """
    assert request.value is not None
    device = request.shape.device.type
    tensors = request.query, request.key, request.value
    if device == "cpu":  # there the products take the inputs' dtype, and tensors that require grad are refused
        tensors = tuple(tensor.detach().to(request.dtype) for tensor in tensors)
    with torch._dynamo.config.patch(recompile_limit=VERSIONS, accumulated_recompile_limit=VERSIONS):
        output, auxiliary = compiled(device)(
            *tensors,
            score_mod=score_mod(request),
            block_mask=block_mask(request),
            scale=request.scale,
            enable_gqa=request.query.shape[1] != request.key.shape[1],
            return_aux=AuxRequest(lse=request.statistics.lse),
        )
    return fused_answer(request, output, auxiliary.lse)


@lru_cache(maxsize=2)
def compiled(device: str) -> Callable[..., tuple[Tensor, Any]]:
    """Return FlexAttention compiled for a type of device; on a CPU traced only, with PyTorch's plain operations."""
    return torch.compile(flex_attention, fullgraph=True, backend="eager" if device == "cpu" else "inductor")
