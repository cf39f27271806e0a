"""Taking turns: every call of a group once for memory, then round after round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vislm.bench.pruning.cases import Measured, bare_seconds, call, short_prompt_seconds
from vislm.bench.pruning.field import field_seconds, map_bytes
from vislm.bench.pruning.model import Subject
from vislm.lmm.cost.measuring import memory_growth
from vislm.lmm.interventions import Intervention

Rounds = list[list[Measured]]
"""For every call of a group its timed rounds."""


def bare_ratio(subject: Subject, rounds: int) -> float:
    """Return the time of a session without methods over that of the model alone."""
    calls: list[Callable[[], float]] = [lambda: bare_seconds(subject), lambda: call(subject, ()).seconds]
    for warm in calls:
        warm()
    alone, attached = (min(times) for times in zip(*([c() for c in calls] for _ in range(rounds)), strict=True))
    return attached / alone


def measure(
    subject: Subject, groups: Mapping[str, Sequence[Sequence[Intervention]]], rounds: int, deadline: float
) -> dict[str, Rounds]:
    """Return the timed rounds of every group's calls; memory is measured in a first round, which is not timed.

    Args:
        subject: the model and its prompt.
        groups: name -> the interventions of calls that take turns.
        rounds: at most; the first is always made.
        deadline: of ``time.perf_counter``, after which no round starts.
    """
    device = subject.model.device
    whole = memory_growth(lambda: call(subject, ()), device)[1]
    peaks = {
        name: [memory_growth(lambda m=methods: call(subject, m), device)[1] if methods else whole for methods in group]
        for name, group in groups.items()
    }
    seen: dict[str, Rounds] = {name: [[] for _ in group] for name, group in groups.items()}
    for number in range(rounds):
        for name, group in groups.items():
            if number and time.perf_counter() > deadline:
                return seen
            for place, methods in enumerate(group):
                found = call(subject, methods)
                run = replace(found.run, peak_bytes=peaks[name][place], features=None)
                seen[name][place].append(replace(found, run=run))
    return seen


def plain_prompts(subject: Subject, full: int, counts: Mapping[int, float], rounds: int) -> dict[int, float]:
    """Return the share of the saving that a plain prompt realises, by its number of columns.

    Args:
        subject: the model.
        full: columns of the whole prompt.
        counts: columns of a shorter one -> its FLOPs over those of the whole one.
        rounds: timed ones.
    """
    columns = [full, *counts]
    for count in columns:
        short_prompt_seconds(subject, count)
    times = [[short_prompt_seconds(subject, count) for count in columns] for _ in range(rounds)]
    whole, *short = (min(own) for own in zip(*times, strict=True))
    return {
        count: (1 - seconds / whole) / (1 - share)
        for (count, share), seconds in zip(counts.items(), short, strict=True)
    }


@dataclass(frozen=True)
class Field:
    """The model with eager attention that returns its maps."""

    seconds: float
    """Until the first word, untouched."""
    sdpa_seconds: float
    """The same with SDPA, measured in the same rounds."""
    map_bytes: int
    """Of all maps, by count."""
    peak: int | None
    """Of the untouched model."""
    pruned: dict[float, float]
    """Budget -> seconds with FastV's cut."""


def measure_field(subject: Subject, keeps: Sequence[float], rounds: int) -> Field:
    """Measure it: memory without a cut, which warms up, and then all in turn with the untouched model and SDPA."""
    wanted: list[float | None] = [None, *keeps]
    peak = memory_growth(lambda: field_seconds(subject, None), subject.model.device)[1]
    times = [[call(subject, ()).seconds, *(field_seconds(subject, keep) for keep in wanted)] for _ in range(rounds)]
    sdpa, whole, *cut = (min(own) for own in zip(*times, strict=True))
    columns = subject.inputs["input_ids"].shape[1]
    return Field(
        whole,
        sdpa,
        map_bytes(subject, columns),
        peak,
        dict(zip(keeps, cut, strict=True)),
    )
