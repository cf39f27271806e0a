"""ALiBi's factors are ALiBi, in half precision too; the naive ones are not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vislm.errors import UnknownName, UsageError
from vislm.kernels.bias import LowRankBias
from vislm.kernels.factors import alibi_bias, alibi_slopes

LONG = 8192


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8, 16, 32])
def test_slopes_of_powers_of_two_follow_one_rule(num_heads) -> None:
    expected = torch.tensor([2.0 ** (-8 * (h + 1) / num_heads) for h in range(num_heads)])
    for rule in ("interpolated", "geometric"):
        assert torch.equal(alibi_slopes(num_heads, rule=rule), expected)


def test_slopes_of_other_numbers_are_interpolated() -> None:
    assert alibi_slopes(6).tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    twelve = [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(twelve))
    torch.testing.assert_close(
        alibi_slopes(6, rule="geometric"), torch.tensor([2.0 ** (-8 * h / 6) for h in range(1, 7)])
    )


@given(
    num_queries=st.integers(1, 40),
    num_keys=st.integers(1, 40),
    num_heads=st.integers(1, 7),
    split=st.booleans(),
    softmax_only=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_form_is_alibi(dense, offsets, num_queries, num_keys, num_heads, split, softmax_only) -> None:
    slopes = alibi_slopes(num_heads)
    bias = alibi_bias(slopes, num_queries, num_keys, softmax_only=softmax_only, split=split, dtype=torch.float64)
    assert bias.query_factor.shape[-1] == (1 if softmax_only else 2) * (2 if split else 1)
    used = slopes.bfloat16().double() if split else slopes.double()
    expected = used[:, None, None] * offsets(num_queries, num_keys)
    logits = dense(bias).expand(1, num_heads, num_queries, num_keys)
    if softmax_only:
        logits, expected = logits.softmax(-1), expected.softmax(-1)
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_heads", [8, 6, 12])
def test_split_factors_are_exact_in_half_precision_at_8192_tokens(dense, offsets, num_heads, dtype) -> None:
    slopes = alibi_slopes(num_heads)
    bias = alibi_bias(slopes, 64, LONG, split=True, dtype=dtype)
    assert bias.query_factor.dtype == dtype
    expected = slopes.bfloat16().double()[:, None, None] * offsets(64, LONG)
    assert torch.equal(dense(bias)[0], expected)
    assert torch.equal(dense(bias, torch.float32)[0].double(), expected)  # nor does the float32 sum round


def test_split_softmax_factors_are_exact_in_bfloat16_at_8192_tokens(dense) -> None:
    slopes = alibi_slopes(12)
    bias = alibi_bias(slopes, 4, LONG, split=True, softmax_only=True, dtype=torch.bfloat16)
    assert bias.query_factor.shape == (1, 12, 4, 2)
    expected = slopes.bfloat16().double()[:, None] * torch.arange(LONG)
    assert torch.equal(dense(bias, torch.float32)[0, :, 3].double(), expected)


def test_split_stays_exact_up_to_the_last_token_allowed(dense, offsets) -> None:
    slopes = torch.tensor([0.7])
    bias = alibi_bias(slopes, 3, 65536, split=True, dtype=torch.bfloat16)
    expected = slopes.bfloat16().double() * offsets(3, 65536)
    assert torch.equal(dense(bias, torch.float32)[0, 0].double(), expected)


@pytest.mark.parametrize("softmax_only", [False, True])
def test_naive_factors_fail_in_bfloat16_at_8192_tokens(dense, softmax_only) -> None:
    slopes = alibi_slopes(8)
    exact = alibi_bias(slopes, 64, LONG, softmax_only=softmax_only)
    rounded = LowRankBias(exact.query_factor.bfloat16(), exact.key_factor.bfloat16())
    error = dense(rounded, torch.float32) - dense(exact)
    assert error.abs().max() > 4  # slope 1/2, positions off by up to 16
    with pytest.raises(UsageError, match="use split=True"):
        alibi_bias(slopes, LONG, softmax_only=softmax_only, dtype=torch.bfloat16)


def test_positions_that_a_dtype_holds_are_accepted(dense, offsets) -> None:
    bias = alibi_bias(alibi_slopes(4), 257, dtype=torch.bfloat16)
    assert torch.equal(dense(bias)[0, 0], 0.25 * offsets(257, 257))
    assert alibi_bias(alibi_slopes(4), 2049, dtype=torch.float16).key_factor.max() == 2048
    with pytest.raises(UsageError, match="not exact"):
        alibi_bias(alibi_slopes(4), 258, dtype=torch.bfloat16)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("softmax_only", [False, True])
def test_gradients_reach_the_slopes(dense, offsets, split, softmax_only) -> None:
    slopes = torch.tensor([0.5, 0.3], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bias = alibi_bias(slopes, 5, 9, split=split, softmax_only=softmax_only, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((dense(bias)[0] * weight).sum(), slopes)
    distance = torch.arange(9.0) if softmax_only else offsets(5, 9)
    torch.testing.assert_close(gradient, (weight * distance).sum((-1, -2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 2), 4), r"slopes is torch.float32 \(2, 2\), expected floating-point \(H,\)"),
        ((0.5, 4), r"slopes is 0.5, expected floating-point \(H,\)"),
        ((torch.ones(2), 0), "num_queries=0"),
        ((torch.ones(2), 4, 0), "num_keys=0"),
    ],
)
def test_bad_input_is_named(arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        alibi_bias(*arguments)


def test_bad_options_are_named() -> None:
    with pytest.raises(UsageError, match="65537 tokens"):
        alibi_bias(torch.ones(1), 65537, split=True)
    with pytest.raises(UsageError, match=r"torch\.int64, expected a floating-point dtype"):
        alibi_bias(torch.ones(1), 4, dtype=torch.int64)
    with pytest.raises(UsageError, match="num_heads=0"):
        alibi_slopes(0)
    with pytest.raises(UnknownName, match="did you mean 'geometric'"):
        alibi_slopes(4, rule="geometrical")  # pyright: ignore[reportArgumentType]
