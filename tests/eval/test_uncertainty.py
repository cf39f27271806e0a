"""Intervals and tests against closed forms and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from vislm.errors import UsageError
from vislm.eval.uncertainty import difference, interval, mcnemar, standard_error


def test_the_standard_error_of_independent_samples() -> None:
    values = np.random.default_rng(0).normal(size=400)
    assert standard_error(values.tolist()) == pytest.approx(values.std(ddof=1) / 20)


def test_copies_of_a_sample_carry_no_information() -> None:
    values = np.random.default_rng(0).normal(size=50)
    tenfold = np.repeat(values, 10)
    groups = np.repeat(np.arange(50), 10).tolist()
    assert standard_error(tenfold.tolist(), groups) == pytest.approx(standard_error(values.tolist()))
    alone, copied = interval(values), interval(tenfold, groups)
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_intervals_cover_the_truth_about_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        found = interval((generator.random(120) < 0.7).astype(float), resamples=300)
        hits += found.low <= 0.7 <= found.high
    assert 178 <= hits <= 199


def test_a_statistic_of_several_columns() -> None:
    rows = np.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 2.0]])
    found = interval(rows, statistic=lambda x: x[:, 0].sum() / x[:, 1].sum())
    assert found.value == pytest.approx(9 / 8)
    assert found.low < found.value < found.high


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    generator = np.random.default_rng(2)
    b = (generator.random(1000) < 0.8).astype(float)
    a = b.copy()
    a[generator.choice(1000, 40, replace=False)] = 1.0
    found = difference(a, b)
    assert found.low > 0
    assert found.p < 0.05
    assert found.losses == 0
    assert found.mcnemar == pytest.approx(2 * 0.5**found.wins)
    assert found.high - found.low < interval(a).high - interval(a).low


def test_equal_runs_do_not_differ() -> None:
    found = difference([1, 0, 1, 1], [1, 0, 1, 1])
    assert (found.value, found.p, found.mcnemar, found.wins, found.losses) == (0.0, 1.0, 1.0, 0, 0)


@pytest.mark.parametrize(("wins", "losses", "p"), [(0, 0, 1.0), (5, 5, 1.0), (10, 2, 0.0385742), (3, 0, 0.25)])
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int, p: float) -> None:
    assert mcnemar(wins, losses) == pytest.approx(p, abs=1e-6)
    assert mcnemar(losses, wins) == mcnemar(wins, losses)


def test_mcnemar_of_many_pairs_is_close_to_the_normal_approximation() -> None:
    # z = (1060 - 940) / sqrt(2000) = 2.683, continuity-corrected 2.661
    assert mcnemar(1060, 940) == pytest.approx(0.0078, abs=3e-4)


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(UsageError, match="runs of 2 and 3 samples"):
        difference([1, 0], [1, 0, 1])
    with pytest.raises(UsageError, match="1 groups for 2 samples"):
        interval([1, 0], ["a"])
