"""A pruned run beside the same prompt without pruning: times, memory, and how much of the saving is real."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from vislm.kernels.scratch import release_scratch
from vislm.lmm.interventions import Intervention
from vislm.lmm.model import LMM, ImageSource
from vislm.lmm.run import PHASES, Run

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """What one question cost with methods and without."""

    answer: str
    """With the methods."""
    pruned: Run
    full: Run
    """Without pruning methods; both with the fastest time of every phase, and with ``peak_bytes``."""


def compare(
    lmm: LMM,
    image: ImageSource | Sequence[ImageSource] | None,
    question: str,
    pruning: Sequence[Intervention],
    others: Sequence[Intervention] = (),
    *,
    rounds: int = 2,
    max_new_tokens: int = 64,
) -> Comparison:
    """Answer a question with and without pruning, in turn: 1 + 2 ``rounds`` answers, and two short ones for memory.

    Args:
        lmm: the model.
        image: as for ``lmm.ask``.
        question: as for ``lmm.ask``.
        pruning: the methods that are left out for comparison.
        others: methods that stay.
        rounds: timed ones; the first answer of all is not timed.
        max_new_tokens: upper limit of an answer.
    """

    def call(methods: Sequence[Intervention], words: int = max_new_tokens) -> tuple[str, Run]:
        with lmm.using(*methods):
            answer = lmm.ask(image, question, max_new_tokens=words)
        assert lmm.last_run is not None
        return answer, lmm.last_run

    with_pruning, without = (*pruning, *others), tuple(others)
    answer, _ = call(with_pruning)
    seen = [(call(without)[1], call(with_pruning)[1]) for _ in range(rounds)]
    full, pruned = (fastest(runs) for runs in zip(*seen, strict=True))
    device = lmm.model.device
    return Comparison(
        answer,
        replace(pruned, peak_bytes=memory_growth(lambda: call(with_pruning, 1), device)[1]),
        replace(full, peak_bytes=memory_growth(lambda: call(without, 1), device)[1]),
    )


def fastest(runs: Sequence[Run]) -> Run:
    """Return the last of several runs of one prompt, with the least seconds of every phase."""
    return replace(runs[-1], seconds={phase: min(run.seconds[phase] for run in runs) for phase in PHASES})


def memory_growth(call: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Return a call's result, and by how many bytes memory grew at most.

    On CUDA memory is what PyTorch has allocated; on the CPU the resident memory of the process, after memory that was
    freed before has gone back to the system; None where the system does not tell (CPU memory elsewhere than on Linux).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _CLEAR.exists():
        return call(), None
    release_scratch()
    gc.collect(1)  # of everything it takes seconds
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _CLEAR.write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    result = call()
    return result, max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
