"""Starting a kernel, or only writing down how it would be started: what the audit compiles is what calls launch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from vislm.kernels.backends.triton.audit_case import TARGETS


class Launch(NamedTuple):
    """One launch: ``arguments`` by name, ``tl.constexpr`` ones included."""

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int


class _Recording(NamedTuple):
    target: int
    launches: list[Launch]


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


def launch(kernel: Any, programs: int, arguments: Mapping[str, Any], num_warps: int, num_stages: int) -> None:
    """Start ``programs`` programs of a kernel on the device of its first tensor; nothing if there are none."""
    unknown = set(arguments) - set(kernel.arg_names)
    if unknown:  # Triton's interpreter would drop them without a word
        raise TypeError(f"{kernel.__name__} has no parameters {sorted(unknown)}")
    recording = _recording.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, programs, arguments, num_warps, num_stages))
        return
    if programs == 0:
        return
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[(programs,)](**arguments, num_warps=num_warps, num_stages=num_stages)


@contextmanager
def recorded(target: int) -> Iterator[list[Launch]]:
    """Within this context launches are appended to the yielded list instead, with the tiles of ``target``.

    Meta tensors are enough: ``with recorded(90) as launches: run(request)``.
    """
    launches: list[Launch] = []
    token = _recording.set(_Recording(target, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def target_of(device: torch.device) -> int:
    """Return whose tile configurations fit a device: that of the recording, or the card's own or next older one.

    The tiles of 80 need at most 99 KiB of shared memory, so they also fit the consumer cards 8.6, 8.9 and 12.0 (which
    has neither of the matrix units of 9.0 and 10.0). The interpreter takes them too.
    """
    recording = _recording.get()
    if recording is not None:
        return recording.target
    if device.type != "cuda":
        return TARGETS[0]
    major, _ = torch.cuda.get_device_capability(device)
    return 10 * major if 10 * major in TARGETS else TARGETS[0]
