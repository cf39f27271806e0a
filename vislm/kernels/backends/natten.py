"""Neighborhood attention by NATTEN's own kernels, where it is installed with its CUDA library.

NATTEN is asked which of its kernels take a call before it is made. Without its CUDA library it is plain Python around
FlexAttention: that runs on a CPU, forward only, when asked for by name. Nothing here has run on a GPU yet.

Source: NATTEN 0.21.7 (arXiv 2504.16922); https://github.com/SHI-Labs/NATTEN.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache, partial
from importlib import import_module, metadata
from typing import NamedTuple

import torch
from torch import Tensor

from vislm.kernels.backends.fused_output import beyond_output, fused_answer
from vislm.kernels.patterns import Neighborhood
from vislm.kernels.request import Answer, AttentionRequest

LEAST_VERSION = (0, 21)


class Operands(NamedTuple):
    """Tensors as NATTEN wants them: ``(B, *grid, H, D)``, and prefix tokens apart as ``(B, P, H, D)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor | None
    prefix_value: Tensor | None


def supports(request: AttentionRequest) -> str | None:
    """Return why NATTEN cannot run the request, by its own words where the call is one of its kind; None = it can."""
    pattern = request.pattern
    if not isinstance(pattern, Neighborhood):
        return f"runs Neighborhood only, not {type(pattern).__name__}"
    reason = beyond_output(request) or _beyond_neighborhood(request, pattern) or _beyond_device(request)
    if reason is not None:
        return reason
    version = _version()
    if version is None:
        return "NATTEN is not installed"
    if version < LEAST_VERSION:
        return f"needs NATTEN {'.'.join(map(str, LEAST_VERSION))} or later, this is {'.'.join(map(str, version))}"
    if request.shape.device.type == "cuda" and not import_module("natten").HAS_LIBNATTEN:
        return "NATTEN is installed without its CUDA library, libnatten"
    return _refusal(request, pattern)


def only_when_forced(request: AttentionRequest) -> str | None:
    """Return why this backend waits to be asked for by name although it can run the request; None = it need not."""
    return "is FlexAttention without compilation on a CPU" if request.shape.device.type == "cpu" else None


def run(request: AttentionRequest) -> Answer:
    """Return the answer to a request that :func:`supports` accepts."""
    pattern = request.pattern
    assert isinstance(pattern, Neighborhood)
    # Its kernels copy what is not contiguous, and its merge with prefix tokens wants outputs that are, as queries are.
    query, key, value, prefix_key, prefix_value = (
        tensor if tensor is None else tensor.contiguous() for tensor in _operands(request, pattern)
    )
    attend = getattr(import_module("natten"), f"na{len(pattern.grid)}d")
    output, lse = attend(
        query,
        key,
        value,
        kernel_size=pattern.window,
        stride=pattern.stride,
        dilation=pattern.dilation,
        is_causal=pattern.causal,
        scale=request.scale,
        additional_keys=prefix_key,
        additional_values=prefix_value,
        return_lse=True,
    )
    last = len(pattern.grid)
    return fused_answer(request, output.flatten(1, last).transpose(1, 2), lse.flatten(1, last).transpose(1, 2))


@lru_cache(maxsize=1)
def _version() -> tuple[int, ...] | None:
    """Return NATTEN's major and minor version; None where it is not installed."""
    try:
        found = metadata.version("natten")
    except metadata.PackageNotFoundError:
        return None
    return tuple(int(number) for number in re.findall(r"\d+", found)[:2])


def _beyond_neighborhood(request: AttentionRequest, pattern: Neighborhood) -> str | None:
    """Return what the request wants beyond NATTEN's operator; None = nothing."""
    if request.bias is not None or request.key_logits is not None:
        return "adds no logits"
    if pattern.border != "shift":
        return f"has border='shift' only, not {pattern.border!r}"
    if min(pattern.window) < 2:
        return f"needs windows of 2 or more, these are {pattern.window}"
    if request.shape.num_queries != math.prod(pattern.grid):
        return "has no queries outside of the grid"
    return "takes scale=0 for the default" if request.scale == 0 else None


def _beyond_device(request: AttentionRequest) -> str | None:
    device = request.shape.device.type
    if device not in ("cpu", "cuda"):
        return f"needs CUDA or CPU tensors, these are on {device}"
    if device == "cpu" and request.differentiable:
        return "has no backward on the CPU"
    if device == "cpu" and request.query.dtype != torch.float32:
        return f"is exact for float32 only on the CPU, not {request.query.dtype}"
    if request.differentiable and request.statistics.lse:
        return "has no gradient of lse; use torch.no_grad() if none is needed"
    return None


def _refusal(request: AttentionRequest, pattern: Neighborhood) -> str | None:
    """Return what NATTEN says against running the request on this device; None = nothing."""
    natten = import_module("natten.backends")
    if request.shape.device.type == "cpu":
        local = plain = partial(natten.can_run_flex_attention, torch_compile=False)
    else:  # of its CUDA kernels the ones that take most; NATTEN uses a faster one where that takes the call too
        local, plain = natten.can_run_cutlass_fna, natten.can_run_cutlass_fmha
    query, key, value, prefix_key, prefix_value = _operands(request, pattern)
    last = len(pattern.grid)
    is_whole = pattern.window == pattern.grid and (not any(pattern.causal) or (last == 1 and prefix_key is None))
    try:
        if not is_whole:
            local(query, key, value, raise_error=True)
        if is_whole or prefix_key is not None:  # windows as large as the grid, and prefix tokens, are plain attention
            keys = (key.flatten(1, last), value.flatten(1, last)) if prefix_key is None else (prefix_key, prefix_value)
            causal = is_whole and any(pattern.causal)
            plain(query.flatten(1, last), *keys, is_causal=causal, is_varlen=False, raise_error=True)
    except (RuntimeError, ValueError) as error:  # its NotImplementedError is a RuntimeError
        return str(error)
    return None


def _operands(request: AttentionRequest, pattern: Neighborhood) -> Operands:
    assert request.value is not None
    tensors = (tensor.transpose(1, 2) for tensor in (request.query, request.key, request.value))
    if request.shape.device.type == "cpu":
        tensors = (tensor.detach() for tensor in tensors)  # FlexAttention refuses tensors that require grad there
    query, key, value = tensors
    prefix = pattern.prefix
    return Operands(
        query.unflatten(1, pattern.grid),
        key[:, prefix:].unflatten(1, pattern.grid),
        value[:, prefix:].unflatten(1, pattern.grid),
        key[:, :prefix] if prefix else None,
        value[:, :prefix] if prefix else None,
    )
