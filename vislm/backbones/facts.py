"""What a backbone costs here, and how far it sees: measured, not quoted."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vislm.backbones.backbone import Backbone

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Cost:
    """What one forward pass took.

    Attributes:
        milliseconds: median of the runs.
        memory: bytes at most in use beside weights and images; None where the system does not tell (a CPU elsewhere
            than on Linux).
    """

    milliseconds: float
    memory: int | None


def measure(model: Backbone, size: Sequence[int], *, batch: int = 1, runs: int = 5) -> Cost:
    """Return time and memory of a forward pass in evaluation, where the model is.

    Args:
        model: is put into evaluation mode.
        size: ``(H, W)`` of the images.
        batch: images at once.
        runs: how often it is timed, after one call that is not.
    """
    weight = next(model.parameters())
    images = torch.randn(batch, model.config.in_chans, *size, device=weight.device, dtype=weight.dtype)
    model.eval()

    def call() -> Any:
        output = model(images)
        if weight.device.type == "cuda":
            torch.cuda.synchronize(weight.device)
        return output

    with torch.inference_mode():
        call()
        times = [_seconds(call) for _ in range(runs)]
        memory = _cuda_peak(call, weight.device) if weight.device.type == "cuda" else _resident_peak(call)
    return Cost(1000 * statistics.median(times), memory)


def receptive_fields(model: Backbone, size: Sequence[int]) -> list[tuple[int, int]]:
    """Return per level the height and width of what its middle token sees of an image of ``size``, in pixels.

    Found from gradients in float64, so that a path on which they vanish altogether is missed.
    """
    model.eval().double()
    images = torch.randn(1, model.config.in_chans, *size, dtype=torch.float64, device=next(model.parameters()).device)
    images.requires_grad_()
    fields: list[tuple[int, int]] = []
    for features in model.stage_maps(images):
        if not fields or fields[-1] != tuple(size):  # what is behind sees no less
            channels = features[0, :, features.shape[2] // 2, features.shape[3] // 2]
            # Not their plain sum, which behind a layer norm is the same for every image.
            middle = channels @ torch.linspace(1.0, 2.0, len(channels)).to(channels)
            (gradient,) = torch.autograd.grad(middle, images, retain_graph=True)
            seen = (gradient[0] != 0).any(0).nonzero()
            height, width = (seen.amax(0) - seen.amin(0) + 1).tolist()
            fields.append((height, width))
        else:
            fields.append(fields[-1])
    return fields


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_peak(call: Callable[[], Any], device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _resident_peak(call: Callable[[], Any]) -> int | None:
    """Return by how many bytes the process's resident memory grows at most during a call."""
    if not _CLEAR.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what earlier calls freed must not hide what this one takes
    _CLEAR.write_text("5", encoding="ascii")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
