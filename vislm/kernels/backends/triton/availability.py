"""Whether Triton can run a call at all, found out without importing it."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch

from vislm.kernels.request import AttentionRequest

LEAST_CAPABILITY = (8, 0)


def unavailable(request: AttentionRequest) -> str | None:
    """Return why no Triton kernel of this package can run the call's tensors where they are; None = they can."""
    device = request.shape.device
    if not installed():
        return "Triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"needs CUDA tensors, these are on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"needs compute capability 8.0, this card has {major}.{minor}"
    if request.query.dtype == torch.float64:
        return "has no float64 kernels"
    return None


def interpreted() -> bool:
    """Return whether ``TRITON_INTERPRET`` asks for Triton's interpreter, which also runs CPU tensors (slowly)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@lru_cache(maxsize=1)
def installed() -> bool:
    """Return whether the package Triton is there."""
    return find_spec("triton") is not None
