"""Every trial of docs/reliability.md, in the size that fits into each run of the tests."""

from __future__ import annotations

import random

import pytest
from mutations import mutated
from trials import QUICK, trials


@pytest.mark.slow
@pytest.mark.parametrize("name", list(trials(QUICK)))
def test_promises_hold(name) -> None:
    outcome = trials(QUICK)[name]()
    assert not outcome.failures, outcome.failures[:5]
    assert outcome.cases >= QUICK.least[name], outcome


def test_mutations_damage_and_can_be_repeated() -> None:
    data = bytes(range(256)) * 4
    first = [mutated(data, random.Random(i)) for i in range(200)]
    assert first == [mutated(data, random.Random(i)) for i in range(200)]
    assert sum(m != data for m in first) > 190
    assert mutated(b"", random.Random(0)) is not None
