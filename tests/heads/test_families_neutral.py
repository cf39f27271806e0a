"""Settings that must not act leave every family's model bit-identical: prefill and eight decode steps."""

from __future__ import annotations

import functools

import families
import pytest
import torch
from families import FAMILIES
from family_cases import CASES
from family_eager import STEPS, built
from running import GENERATE
from torch import Tensor

from vislm import attach

NEUTRAL = [
    pytest.param(method, id=f"{name} {number}")
    for name, case in CASES.items()
    for number, method in enumerate(case.neutral)
]


@functools.cache
def batch(family: str) -> dict[str, Tensor]:
    """Left padding; one image, and none."""
    picture = FAMILIES[family].picture
    return families.inputs(family, ([picture(0, 0)], [7, 8, 9]), ([], [9, 10, 11]))


@functools.cache
def untouched(family: str) -> Tensor:
    return torch.stack(built(family).generate(**batch(family), **{**GENERATE, "max_new_tokens": STEPS + 1}).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", NEUTRAL)
def test_neutral_settings_are_bit_identical(family: str, method) -> None:
    model = built(family)
    expected = untouched(family)
    with attach(model, method) as session:
        assert not session.plan.watches_language
        assert not session.plan.logits
        assert not session.one_at_a_time
        out = model.generate(**batch(family), **{**GENERATE, "max_new_tokens": STEPS + 1})
    assert torch.equal(torch.stack(out.logits), expected)
