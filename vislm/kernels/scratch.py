"""Memory that the chunks of a pass share, and on a CPU the passes of a thread."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

MAX_KEPT = 1 << 26
"""Bytes that a thread keeps between passes, at most."""


class _Kept(threading.local):
    """What each thread keeps, by dtype."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Scratch] = {}


class Scratch:
    """Uninitialised tensors by name, each in the same memory as the last one of its name where that is large enough.

    Fresh memory costs a CPU more than the arithmetic on it: the system hands it out page by page.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor to write to; what an earlier one of this name holds is lost."""
        size = math.prod(shape)
        if name not in self._flat or len(self._flat[name]) < size:
            with torch.inference_mode(False):  # or it could not be written to outside of that mode later
                self._flat[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._flat[name][:size].view(shape)

    @property
    def bytes(self) -> int:
        """Size of all that is held."""
        return sum(flat.numel() for flat in self._flat.values()) * self.dtype.itemsize


def scratch_for(tensor: Tensor, dtype: torch.dtype) -> Scratch:
    """Return the scratch of a pass over a tensor: on a CPU the one that this thread keeps, unless it grew too large."""
    if tensor.device.type != "cpu" or type(tensor) is not Tensor:  # such as the fake tensors of a compiler
        return Scratch(dtype, tensor.device)
    kept = _kept.by_dtype
    if dtype not in kept or kept[dtype].bytes > MAX_KEPT:
        kept[dtype] = Scratch(dtype, tensor.device)
    return kept[dtype]


_kept = _Kept()


def release_scratch() -> None:
    """Give back the memory that this thread keeps between passes."""
    _kept.by_dtype.clear()
