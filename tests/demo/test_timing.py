"""Interleaved timing."""

from __future__ import annotations

import pytest
import torch

from vislm.demo.timing import interleaved, threads
from vislm.lmm.run import Run


def test_calls_take_turns_and_medians_leave_out_the_warm_up() -> None:
    order: list[str] = []

    def call(name: str, seconds: list[float]):
        def one() -> Run:
            order.append(name)
            return Run(seconds={"tower": seconds[order.count(name) - 1], "prefill": 1.0, "decode": 7.0})

        return one

    first, second = interleaved([call("a", [99.0, 3.0, 1.0, 2.0]), call("b", [99.0, 6.0, 4.0, 50.0])], rounds=3)
    assert order == list("abababab")
    assert first.seconds == {"tower": 2.0, "prefill": 1.0, "decode": 7.0}
    assert second.seconds["tower"] == 6.0
    order.clear()
    (fastest,) = interleaved([call("a", [0.0, 3.0, 1.0, 2.0])], rounds=3, pick=min)
    assert fastest.seconds["tower"] == 1.0


def test_a_spent_budget_still_gives_one_round() -> None:
    calls: list[int] = []

    def call() -> Run:
        calls.append(1)
        return Run()

    interleaved([call], rounds=5, budget=0.0)
    assert len(calls) == 2


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
