"""Learned biases: the rank is chosen per head, and the report tells the truth."""

from __future__ import annotations

import pytest
import torch

from vislm.errors import UsageError
from vislm.kernels.bias import HeadwiseBias, LowRankBias
from vislm.kernels.factors import alibi_bias, alibi_slopes, factorize_bias, spectrum, truncated_bias


@pytest.fixture(scope="module")
def mixed() -> torch.Tensor:
    """Four heads (N = 30) of rank 1, full, 3 and 0."""
    random = torch.Generator().manual_seed(0)
    full = torch.randn(30, 30, generator=random)
    three = torch.randn(30, 3, generator=random) @ torch.randn(3, 30, generator=random)
    return torch.stack([torch.outer(full[0], full[1]), full, three, torch.zeros(30, 30)])


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_low_rank_heads_are_factored_and_the_rest_stays_dense(dense, mixed, balance) -> None:
    bias, report = factorize_bias(mixed, energy=1 - 1e-9, max_rank=4, balance=balance)
    assert isinstance(bias, HeadwiseBias)
    assert bias.low_rank_heads == (0, 2, 3)
    assert bias.dense_heads == (1,)
    assert report.rank.tolist() == [1, 30, 3, 1]
    assert bias.low_rank.query_factor.shape == bias.low_rank.key_factor.shape == (1, 3, 30, 3)
    torch.testing.assert_close(dense(bias.low_rank, torch.float32)[0], mixed[[0, 2, 3]], rtol=0, atol=1e-5)
    assert torch.equal(bias.dense[0], mixed[1:2])
    assert report.energy.tolist() == pytest.approx([1, 1, 1, 1])
    assert report.max_error[1] == 0
    assert "factors" in str(report)
    assert len(str(report).splitlines()) == 5


def test_all_heads_low_rank_gives_plain_factors(dense) -> None:
    alibi = dense(alibi_bias(alibi_slopes(4), 40))[0].float()
    bias, report = factorize_bias(alibi)
    assert isinstance(bias, LowRankBias)
    assert report.low_rank.all()
    assert report.rank.max() <= 2
    exact, _ = factorize_bias(alibi, energy=1 - 1e-12)
    assert isinstance(exact, LowRankBias)
    torch.testing.assert_close(dense(exact)[0], alibi.double(), rtol=0, atol=1e-5)


def test_no_head_low_rank_gives_the_dense_bias(mixed) -> None:
    bias, report = factorize_bias(mixed[1:2], energy=1.0)
    assert torch.equal(bias, mixed[1:2][None])
    assert not report.low_rank.any()


def test_the_smallest_rank_with_the_energy_is_chosen(mixed) -> None:
    values, kept = spectrum(mixed)
    assert values.shape == kept.shape == (4, 30)
    _, report = factorize_bias(mixed, energy=0.9, max_rank=30)
    for head in range(3):
        rank = int(report.rank[head])
        assert kept[head, rank - 1] >= 0.9
        assert rank == 1 or kept[head, rank - 2] < 0.9
        assert report.energy[head] == kept[head, rank - 1]


def test_the_reported_error_is_measured_on_what_is_stored(dense, mixed) -> None:
    bias, report = factorize_bias(mixed.bfloat16(), energy=0.9, max_rank=30)
    assert isinstance(bias, LowRankBias)
    assert bias.query_factor.dtype == torch.bfloat16
    error = (dense(bias)[0] - mixed.bfloat16().double()).abs().amax((-1, -2))
    torch.testing.assert_close(report.max_error, error)
    assert error[1] > 0.1


def test_truncation_is_the_best_approximation(dense, mixed) -> None:
    values, kept = spectrum(mixed)
    for rank in (1, 7, 30):
        product = dense(truncated_bias(mixed, rank))[0]
        left_over = (product - mixed.double()).square().sum((-1, -2))
        torch.testing.assert_close(left_over, values[:, rank:].square().sum(-1), rtol=1e-4, atol=1e-6)
    assert (kept[:, -1] == 1).all()


def test_heads_may_have_more_keys_than_queries(dense) -> None:
    bias = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1))
    factored, report = factorize_bias(bias, energy=1.0)
    assert isinstance(factored, LowRankBias)
    torch.testing.assert_close(dense(factored)[0].float(), bias)
    assert report.rank.max() <= 4


def test_factors_are_constants_to_train_on() -> None:
    table = torch.randn(1, 5, 5, requires_grad=True)
    bias, _ = factorize_bias(table)
    assert isinstance(bias, LowRankBias)
    assert bias.query_factor.is_leaf
    assert not bias.query_factor.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": torch.ones(4, 4)}, r"expected floating-point \(H, Nq, Nk\)"),
        ({"bias": torch.full((1, 2, 2), -torch.inf)}, "pattern=Masked"),
        ({"energy": 0.0}, "energy=0.0"),
        ({"energy": 99.5}, "energy=99.5"),
        ({"max_rank": 0}, "max_rank=0"),
        ({"balance": 2.0}, "balance=2.0"),
    ],
)
def test_bad_input_is_named(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        factorize_bias(**{"bias": torch.ones(1, 4, 4)} | options)


def test_a_rank_that_does_not_exist_is_named() -> None:
    with pytest.raises(UsageError, match="rank=5, expected 1 to"):
        truncated_bias(torch.ones(1, 4, 6), 5)
