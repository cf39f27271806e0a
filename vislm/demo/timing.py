"""Wall times that can be compared with each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from statistics import median

from vislm.lmm.run import Run


def interleaved(calls: Sequence[Callable[[], Run]], rounds: int) -> list[Run]:
    """Run every call once to warm up, then all of them in turn, ``rounds`` times.

    Taking turns lets whatever else the machine does fall on all calls alike. Returns each call's last run with the
    medians of its tower and prefill seconds.
    """
    for call in calls:
        call()
    seen = [[call() for call in calls] for _ in range(rounds)]
    return [_with_medians(list(runs)) for runs in zip(*seen, strict=True)]


def _with_medians(runs: list[Run]) -> Run:
    last = runs[-1]
    medians = {phase: median(run.seconds[phase] for run in runs) for phase in ("tower", "prefill")}
    return dataclasses.replace(last, seconds={**last.seconds, **medians})
