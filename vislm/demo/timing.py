"""Wall times that can be compared with each other."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median

import torch

from vislm.lmm.run import Run


def interleaved(
    calls: Sequence[Callable[[], Run]],
    rounds: int,
    budget: float = math.inf,
    pick: Callable[[Iterable[float]], float] = median,
) -> list[Run]:
    """Run every call once to warm up, then all of them in turn, ``rounds`` times.

    Taking turns lets whatever else the machine does fall on all calls alike. No round starts after ``budget`` seconds,
    except the first. Returns each call's last run with tower and prefill seconds picked from all rounds: the median, or
    with ``min`` the fastest, which suits few long runs beside other programs.
    """
    for call in calls:
        call()
    began, seen = time.perf_counter(), []
    while not seen or (len(seen) < rounds and time.perf_counter() - began < budget):
        seen.append([call() for call in calls])
    return [_summary(list(runs), pick) for runs in zip(*seen, strict=True)]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads while the context is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _summary(runs: list[Run], pick: Callable[[Iterable[float]], float]) -> Run:
    last = runs[-1]
    picked = {phase: pick([run.seconds[phase] for run in runs]) for phase in ("tower", "prefill")}
    return dataclasses.replace(last, seconds={**last.seconds, **picked})
