"""Attention with factors is attention with the dense bias, gradients included."""

from __future__ import annotations

import pytest
import torch

from vislm.kernels import Causal, Dense, HeadwiseBias, LowRankBias, StatisticsRequest, attend
from vislm.kernels.factors import (
    alibi_bias,
    alibi_slopes,
    class_token_bias,
    cosine_bias,
    decomposed_position_bias,
    factorize_bias,
    squared_distance_bias,
)

HEADS, TOKENS, DIM = 3, 20, 8


@pytest.fixture
def heads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, HEADS, TOKENS, DIM, generator=random, dtype=torch.float64)
    return query, key, value


def _biases(query: torch.Tensor) -> dict[str, LowRankBias]:
    random = torch.Generator().manual_seed(1)
    points = torch.rand(TOKENS, 2, generator=random, dtype=torch.float64)
    tables = [torch.randn(size, DIM, generator=random, dtype=torch.float64) for size in (7, 9)]
    options = {"dtype": torch.float64}
    return {
        "alibi": alibi_bias(alibi_slopes(HEADS), TOKENS, **options),
        "alibi, softmax only": alibi_bias(alibi_slopes(HEADS), TOKENS, softmax_only=True, **options),
        "alibi, split": alibi_bias(alibi_slopes(HEADS), TOKENS, split=True, **options),
        "distance": squared_distance_bias(points, points, torch.rand(HEADS, TOKENS, generator=random)),
        "cosine": cosine_bias(torch.rand(HEADS, 2, generator=random, dtype=torch.float64), TOKENS),
        "class token": class_token_bias(TOKENS, class_to_patches=torch.rand(HEADS), patches_to_class=-1.0),
        "decomposed": decomposed_position_bias(query, tables, (4, 5)),
    }


@pytest.mark.parametrize("name", list(_biases(torch.zeros(2, HEADS, TOKENS, DIM, dtype=torch.float64))))
@pytest.mark.parametrize("pattern", [Dense(), Causal()])
def test_factors_equal_their_dense_bias(dense, heads, name, pattern) -> None:
    bias = _biases(heads[0])[name]
    ours = attend(*heads, pattern=pattern, bias=bias)
    expected = attend(*heads, pattern=pattern, bias=dense(bias), backend="reference")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_softmax_only_factors_are_wrong_for_sigmoid_attention(dense, heads) -> None:
    exact = alibi_bias(alibi_slopes(HEADS), TOKENS, dtype=torch.float64)
    short = alibi_bias(alibi_slopes(HEADS), TOKENS, softmax_only=True, dtype=torch.float64)
    expected = attend(*heads, bias=dense(exact), normalize="sigmoid", backend="reference")
    torch.testing.assert_close(attend(*heads, bias=exact, normalize="sigmoid"), expected)
    assert (attend(*heads, bias=short, normalize="sigmoid") - expected).abs().max() > 0.1


def test_gradients_through_attention_equal_those_of_the_dense_bias(dense, heads) -> None:
    gradients = []
    for materialise in (False, True):
        slopes = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64, requires_grad=True)
        weight = torch.ones(HEADS, TOKENS, dtype=torch.float64, requires_grad=True)
        points = torch.linspace(0, 1, TOKENS, dtype=torch.float64)[:, None].requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for bias in (
            alibi_bias(slopes, TOKENS, dtype=torch.float64),
            squared_distance_bias(points, points.detach(), weight),
        ):
            output = attend(*heads, bias=dense(bias) if materialise else bias)
            total = total + output.square().sum()
        gradients.append(torch.autograd.grad(total, (slopes, weight, points)))
    for ours, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected)


def test_split_alibi_keeps_bfloat16_attention_exact_where_naive_factors_lose_it() -> None:
    tokens, random = 8192, torch.Generator().manual_seed(2)
    query = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
    key = torch.zeros(1, 2, tokens, 8, dtype=torch.bfloat16)
    value = torch.randn(1, 2, tokens, 8, generator=random).bfloat16()
    slopes = torch.tensor([0.5, 0.0625])
    request = StatisticsRequest(rows=range(4))

    def weights(bias: LowRankBias | torch.Tensor) -> torch.Tensor:
        rows = attend(query, key, value, bias=bias, statistics=request).statistics.rows
        assert rows is not None
        return rows

    position = torch.arange(tokens)
    offsets = position[None] - position[-4:, None]
    expected = (slopes[:, None, None].double() * offsets).softmax(-1)
    for softmax_only in (True, False):
        split = alibi_bias(slopes, 4, tokens, split=True, softmax_only=softmax_only, dtype=torch.bfloat16)
        assert (weights(split)[0] - expected).abs().max() < 1e-6
    naive = alibi_bias(slopes, 4, tokens)
    rounded = LowRankBias(naive.query_factor.bfloat16(), naive.key_factor.bfloat16())
    assert (weights(rounded)[0] - expected).abs().max() > 0.1


def test_a_factorised_bias_runs_head_by_head(heads) -> None:
    random = torch.Generator().manual_seed(3)
    bias = torch.randn(HEADS, TOKENS, TOKENS, generator=random, dtype=torch.float64)
    bias[1] = torch.outer(bias[1, 0], bias[1, 1])
    factored, report = factorize_bias(bias, energy=1 - 1e-12)
    assert isinstance(factored, HeadwiseBias)
    assert report.rank.tolist()[1] == 1
    torch.testing.assert_close(attend(*heads, bias=factored), attend(*heads, bias=bias), rtol=0, atol=1e-9)
