"""Three factorisations of one squared distance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vislm.errors import UnknownName, UsageError
from vislm.kernels.factors import squared_distance_bias

RANKS = {"compact": lambda p: p + 2, "paper": lambda p: 3 * p, "softmax": lambda p: p + 1}


def _distance(query, key, weight):
    """Return the dense bias of points (B, H, N, P) and weights (B, H, Nq)."""
    return -weight[..., None] * (query[..., :, None, :] - key[..., None, :, :]).square().sum(-1)


@given(form=st.sampled_from(sorted(RANKS)), axes=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_form_is_the_distance(dense, form, axes, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 5, axes, generator=random, dtype=torch.float64)
    key = torch.randn(2, 7, axes, generator=random, dtype=torch.float64)
    weight = torch.rand(2, 3, 5, generator=random, dtype=torch.float64)
    bias = squared_distance_bias(query, key, weight, form=form)
    assert bias.query_factor.shape == (2, 3, 5, RANKS[form](axes))
    assert bias.key_factor.shape == (2, 1, 7, RANKS[form](axes))
    expected, ours = _distance(query[:, None], key[:, None], weight), dense(bias)
    if form == "softmax":
        expected, ours = expected.softmax(-1), ours.softmax(-1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", sorted(RANKS))
def test_points_and_weights_get_gradients(dense, form) -> None:
    random = torch.Generator().manual_seed(1)
    shapes = ((2, 3, 5, 2), (2, 3, 6, 2), (2, 3, 5))
    tensors = [torch.randn(*s, generator=random, dtype=torch.float64, requires_grad=True) for s in shapes]
    probe = torch.randn(2, 3, 5, 6, generator=random, dtype=torch.float64)
    ours, expected = dense(squared_distance_bias(*tensors, form=form)), _distance(*tensors)
    if form == "softmax":
        ours, expected = ours.softmax(-1), expected.softmax(-1)
    for mine, theirs in zip(
        torch.autograd.grad((ours * probe).sum(), tensors),
        torch.autograd.grad((expected * probe).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_points_far_from_the_origin_lose_nothing(dense) -> None:
    points = torch.rand(20, 2, generator=torch.Generator().manual_seed(2)) + 4096
    bias = squared_distance_bias(points, points)
    exact = _distance(points.double(), points.double(), torch.ones(20))
    assert (dense(bias, torch.float32)[0, 0] - exact).abs().max() < 1e-5


def test_a_number_or_a_weight_per_head_is_enough(dense) -> None:
    points = torch.rand(4, 3)
    alone = dense(squared_distance_bias(points, points, 2.0))
    assert alone.shape == (1, 1, 4, 4)
    per_head = dense(squared_distance_bias(points, points, torch.tensor([1.0, 2.0])[:, None]))
    torch.testing.assert_close(per_head[:, 1:], alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4), torch.ones(4, 2)), "query_points is torch.float32"),
        ((torch.ones(4, 2), torch.ones(4, 2, dtype=torch.int64)), "key_points is torch.int64"),
        ((torch.ones(4, 2), torch.ones(4, 3)), "2 coordinates, key_points 3"),
        ((torch.ones(4, 2), torch.ones(0, 2)), "no empty axis"),
        ((torch.ones(4, 2), torch.ones(6, 2), torch.ones(6)), "does not broadcast"),
    ],
)
def test_bad_input_is_named(arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        squared_distance_bias(*arguments)


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(UnknownName, match="'compact'"):
        squared_distance_bias(torch.ones(4, 2), torch.ones(4, 2), form="compct")  # pyright: ignore[reportArgumentType]
