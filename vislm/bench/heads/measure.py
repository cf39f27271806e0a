"""Taking turns: each group starts with the untouched model, and every second round runs backwards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from vislm.bench.heads.cases import Case
from vislm.bench.pruning.model import Subject
from vislm.lmm.cost.measuring import memory_growth
from vislm.lmm.run import clock
from vislm.lmm.session import attach

WARM_STEPS = 2
"""Decode steps of a run that are not counted."""


@dataclass(frozen=True)
class Measured:
    """One answer."""

    tower: float
    """Seconds of the vision tower's first call."""
    prefill: float
    """Seconds until the first token, without that."""
    steps: list[float]
    """Seconds of each decode step."""


class _Stamps(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> Any:
        self.seconds.append(clock(self.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Tower:
    """The time of the tower's first call."""

    def __init__(self, tower: nn.Module, device: torch.device, stack: ExitStack) -> None:
        self.device = device
        self.started: float | None = None
        self.seconds: float | None = None
        for handle in (tower.register_forward_pre_hook(self._start), tower.register_forward_hook(self._stop)):
            stack.callback(handle.remove)

    def _start(self, *args: Any) -> None:
        if self.started is None:
            self.started = clock(self.device)

    def _stop(self, *args: Any) -> None:
        if self.seconds is None:
            assert self.started is not None
            self.seconds = clock(self.device) - self.started


def answer(subject: Subject, case: Case | None, steps: int, options: Mapping[str, Any] | None = None) -> Measured:
    """Answer with ``steps`` tokens behind the first, under a case, or untouched with ``options`` of ``generate``."""
    device, stamps = subject.model.device, _Stamps(subject.model.device)
    with ExitStack() as stack:
        if case is not None:
            stack.enter_context(attach(subject.model, case.build(subject.adapter)))
            options = case.generate
        tower = _Tower(subject.adapter.tower, device, stack)
        stack.enter_context(torch.no_grad())
        started = clock(device)
        subject.model.generate(
            **subject.inputs,
            max_new_tokens=steps + 1,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([stamps]),
            **(options or {}),
        )
    times = stamps.seconds
    spent = tower.seconds or 0.0
    return Measured(spent, times[0] - started - spent, [b - a for a, b in pairwise(times)])


def text_only_seconds(subject: Subject) -> float:
    """Return the wall time of a prefill of the prompt's text alone."""
    ids = subject.inputs["input_ids"]
    words = ids[~subject.adapter.is_visual(ids)][None]
    started = clock(subject.model.device)
    with torch.no_grad():
        subject.model(input_ids=words, attention_mask=torch.ones_like(words), use_cache=True, logits_to_keep=1)
    return clock(subject.model.device) - started


@dataclass
class Group:
    """Cases that take turns with the untouched model, which decodes as they do."""

    cases: dict[str, Case]
    untouched: list[Measured]
    text_only: list[float]
    rounds: dict[str, list[Measured]]
    peak: int | None
    """By how much memory grows under the untouched model."""
    peaks: dict[str, int | None]

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``generate``."""
        return next(iter(self.cases.values())).generate


def groups_of(cases: Mapping[str, Case], size: int = 3) -> list[Group]:
    """Return cases in groups of at most ``size`` that decode alike."""
    groups: list[Group] = []
    for name, case in cases.items():
        alike = (group for group in groups if len(group.cases) < size and group.options == case.generate)
        group = next(alike, None)
        if group is None:
            group = Group({}, [], [], {}, None, {})
            groups.append(group)
        group.cases[name], group.rounds[name] = case, []
    return groups


def measure(subject: Subject, groups: Sequence[Group], rounds: int, steps: int, deadline: float) -> None:
    """Fill the groups: a first round for memory, which warms up, then the timed ones.

    Args:
        subject: the model and its prompt.
        groups: of :func:`groups_of`.
        rounds: at most; the first is always made.
        steps: decode steps of every answer.
        deadline: of ``time.perf_counter``, after which no round starts.
    """
    device = subject.model.device
    text_only_seconds(subject)
    for group in groups:
        group.peak = memory_growth(lambda g=group: answer(subject, None, 2, g.options), device)[1]
        for name, case in group.cases.items():
            group.peaks[name] = memory_growth(lambda c=case: answer(subject, c, 2), device)[1]
    for number in range(rounds):
        for group in groups:
            if number and time.perf_counter() > deadline:
                return
            _one_round(subject, group, steps, backwards=number % 2 == 1)


def _one_round(subject: Subject, group: Group, steps: int, backwards: bool) -> None:
    order: list[str | None] = [None, *group.cases]
    for name in reversed(order) if backwards else order:
        if name is None:
            group.untouched.append(answer(subject, None, steps, group.options))
            group.text_only.append(text_only_seconds(subject))
        else:
            group.rounds[name].append(answer(subject, group.cases[name], steps))
