"""Costs, budgets, and the ``keep`` that spends a budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vislm.errors import UsageError
from vislm.lmm.run import Run
from vislm.tuning.budget import SLACK, Budget, Cost, solve_keep


def run(layer_tokens: list[int], spent: int) -> Run:
    return Run(
        prompt_tokens=20,
        visual_tokens=[10, 6],
        layer_tokens=layer_tokens,
        flops={"tower": spent, "prefill": 30, "full_tower": 40, "full_prefill": 60},
    )


def test_cost_counts_visual_tokens_only() -> None:
    cost = Cost.of(run([20, 20, 12, 4], 10))
    assert cost == Cost(tokens=(16 + 16 + 8 + 0) / 4 / 16, flops=0.4, average_tokens=10.0)
    assert Cost.mean([cost, Cost(1.0, 1.0, 20.0)]) == Cost(0.8125, 0.7, 15.0)


def test_a_prompt_without_images_has_no_cost() -> None:
    with pytest.raises(UsageError, match="no image"):
        Cost.of(Run(prompt_tokens=5, layer_tokens=[5]))


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("0.25", "tokens", 0.25), ("tokens=64", "tokens", 64), ("flops=0.4", "flops", 0.4), ("1", "tokens", 1.0)],
)
def test_budgets_are_read(text, kind, value) -> None:
    budget = Budget.parse(text)
    assert (budget.kind, budget.value) == (kind, value)
    assert type(budget.value) is type(value)


@pytest.mark.parametrize("text", ["", "0", "1.5", "tokens=-3", "flops=64", "time=0.5", "half", "nan"])
def test_budgets_that_are_none(text) -> None:
    with pytest.raises(UsageError, match="expected a share"):
        Budget.parse(text)


def test_what_exceeds_a_budget() -> None:
    cost, full = Cost(0.5, 0.6, 32.0), Cost(1.0, 1.0, 64.0)
    assert Budget.parse("0.5").violation(cost) < 0.0 < Budget.parse("0.49").violation(cost)
    assert Budget.parse("tokens=32").violation(cost) < 0.0 < Budget.parse("tokens=31").violation(cost)
    assert Budget.parse("flops=0.6").violation(cost) < 0.0 < Budget.parse("flops=0.5").violation(cost)
    assert Budget.parse("tokens=16").share(full) == 0.25
    assert Budget.parse("tokens=999").share(full) == 1.0


@given(st.floats(0.1, 1.0), st.floats(0.0, 0.04), st.floats(0.8, 2.0))
def test_keep_is_found_for_growing_costs(share, fixed, power) -> None:
    cost = lambda keep: fixed + (1.0 - fixed) * keep**power  # noqa: E731
    keep = solve_keep(cost, share)
    assert cost(keep) <= share * (1.0 + SLACK) + 1e-12
    assert cost(keep) >= share * 0.8


def test_a_linear_cost_needs_two_looks() -> None:
    looked: list[float] = []

    def cost(keep: float) -> float:
        looked.append(keep)
        return 0.5 + 0.5 * keep  # half of the layers see everything

    assert cost(solve_keep(cost, 0.6)) == pytest.approx(0.6, rel=SLACK)
    assert len(looked) <= 3


def test_a_budget_that_cannot_be_met_gives_the_cheapest() -> None:
    assert solve_keep(lambda keep: 0.7 + 0.3 * keep, 0.5) == 0.01


def test_refusals() -> None:
    def refuse(keep: float) -> float:
        raise UsageError("never")

    def refuse_low(keep: float) -> float:
        if keep < 0.5:
            raise UsageError("too low")
        return 0.9

    with pytest.raises(UsageError, match="never"):
        solve_keep(refuse, 0.5)
    assert solve_keep(refuse_low, 0.5) == 0.5


def test_of_equal_costs_the_smaller_keep_is_taken() -> None:
    assert solve_keep(lambda keep: 0.3, 0.5) == 0.5
