"""Published schedules on other depths, image sizes and budgets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vislm.errors import UsageError
from vislm.lmm.choosing.schedules import keep_for_average, ratio_for_average, scaled_layers, stage_counts
from vislm.token_pruning import sparsevlm, sparsevlm_plus

TABLES = {"sparsevlm": sparsevlm.COUNTS, "sparsevlm_plus": sparsevlm_plus.COUNTS}


@pytest.mark.parametrize("name", TABLES)
def test_published_budgets_have_published_counts(name) -> None:
    for budget, counts in TABLES[name].items():
        assert stage_counts(TABLES[name], budget, 576) == list(counts)
        assert stage_counts(TABLES[name], budget / 576, 576) == list(counts)
        assert stage_counts(TABLES[name], 5 * budget, 5 * 576) == [5 * n for n in counts]


def test_mean_over_layers_of_the_published_counts() -> None:
    """With the recycled tokens on top: 206.5, 145.4 and 82.3 for the budgets 192, 128 and 64."""
    for budget, mean in ((192, 206.5), (128, 145.4), (64, 82.3)):
        alive, total = 576, 3 * 576
        for kept, layers in zip(sparsevlm.COUNTS[budget], (4, 9, 16), strict=True):
            alive = kept + int((int(0.3 * (alive - kept)) + 1) / 10) + 1
            total += layers * alive
        assert total / 32 == pytest.approx(mean, abs=0.05)


@given(st.sampled_from(list(TABLES)), st.integers(1, 3000), st.data())
def test_counts_are_between_one_and_all(name, tokens, data) -> None:
    keep = data.draw(st.integers(1, tokens) | st.floats(0.0, 1.0, exclude_min=True))
    counts = stage_counts(TABLES[name], keep, tokens)
    assert len(counts) == 3
    assert counts == sorted(counts, reverse=True)
    assert all(1 <= n <= tokens for n in counts)


@given(st.integers(1, 3000))
def test_a_budget_of_everything_keeps_everything(tokens) -> None:
    for keep in (tokens, tokens + 1, 1.0):
        assert stage_counts(sparsevlm.COUNTS, keep, tokens) == [tokens] * 3


def test_budgets_between_published_ones_are_interpolated() -> None:
    assert stage_counts({64: (66, 30), 96: (238, 48)}, 80, 576) == [152, 39]
    assert stage_counts({64: (66, 30), 96: (238, 48)}, 32, 576) == [33, 15]
    assert stage_counts({64: (66, 30), 96: (238, 48)}, 336, 576) == [407, 312]


def test_layers_move_to_the_same_share_of_the_depth() -> None:
    assert scaled_layers((2, 6, 15), 32, 0, 30) == {2: 0, 6: 1, 15: 2}
    assert scaled_layers((2, 6, 15), 64, 0, 62) == {4: 0, 12: 1, 30: 2}
    assert scaled_layers((2, 6, 15), 3, 0, 1) == {0: 0, 1: 2}


def test_fastv_ranks_of_the_published_average_budgets() -> None:
    assert [keep_for_average(n, 576, 2, 32) for n in (192, 128, 64)] == [166, 98, 30]
    assert keep_for_average(576, 576, 2, 32) == 576
    with pytest.raises(UsageError, match=r"least is 36\.9"):
        keep_for_average(36, 576, 2, 32)


@given(st.floats(0.26, 1.0))
def test_a_ratio_gives_the_average_that_it_was_found_for(share) -> None:
    r = ratio_for_average(share, (8, 16, 24), 32)
    assert (1 + r + r**2 + r**3) / 4 == pytest.approx(share)
    assert ratio_for_average(1.0, (8, 16, 24), 32) == 1.0


def test_an_average_below_the_first_layers_is_refused() -> None:
    with pytest.raises(UsageError, match=r"first 8 of 32 layers .* \(25.0%\)"):
        ratio_for_average(0.25, (8, 16, 24), 32)
