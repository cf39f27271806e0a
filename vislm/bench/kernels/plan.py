"""Which cases belong to a setting, and the calls to measure for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

from vislm.bench.kernels.cases import Case, Setting, Skip, our_cases, our_halo_cases
from vislm.bench.kernels.peers import halo_attn_case, peer_cases
from vislm.bench.kernels.statistics import STATISTICS, statistics_cases
from vislm.bench.kernels.timing import forward_call, training_call

Direction = Literal["forward", "training"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


def cases_of(setting: Setting) -> Iterator[Case | Skip]:
    """Yield everything that is to be measured for a setting, our preferred backend first."""
    if setting.pattern == STATISTICS:
        yield from statistics_cases(setting)
        return
    first = None
    for case in our_cases(setting):
        first = case.name if first is None and isinstance(case, Case) else first
        yield case
    if first is None:
        return
    yield from peer_cases(setting, first)
    whole = all(size % setting.window == 0 for size in setting.grid)
    if setting.pattern == "halo" and "timm" in setting.peers and len(setting.grid) == 2 and whole:
        first = None
        for case in our_halo_cases(setting):
            first = case.name if first is None and isinstance(case, Case) else first
            yield case
        if first is not None:
            yield halo_attn_case(setting, first)


def calls_of(cases: Sequence[Case], direction: Direction) -> dict[str, Callable[[], object]]:
    """Return name -> call of the cases that have this direction: inference, or forward and backward."""
    if direction == "forward":
        return {case.name: forward_call(case) for case in cases}
    return {case.name: training_call(case) for case in cases if case.no_backward is None}
