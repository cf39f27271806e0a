"""ZeroTuning's identity, and the heads it touches."""

from __future__ import annotations

import models
import pytest
import torch
from eager import check_against_eager
from hypothesis import given
from hypothesis import strategies as st
from running import generate

from vislm import attach
from vislm.errors import UsageError
from vislm.heads.zerotuning import ZeroTuning, bias_first


@given(seed=st.integers(0, 99), gamma=st.floats(0.05, 20.0), first=st.integers(0, 3))
def test_a_bias_is_the_papers_rescaling(seed: int, gamma: float, first: int) -> None:
    logits = torch.randn(1, 1, 3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = logits.softmax(-1)
    expected = a / ((gamma - 1.0) * a[..., first : first + 1] + 1.0)
    expected[..., first] *= gamma
    scaled = bias_first(logits, torch.tensor([first]), torch.tensor([gamma], dtype=torch.float64)).softmax(-1)
    torch.testing.assert_close(scaled, expected, atol=1e-6, rtol=0)


def test_session_equals_explicit_matrices() -> None:
    factors = ((1, 0, 3.0), (1, 2, 0.25), (4, 3, 5.0))

    def edit(logits, mask, layer):
        weights = (logits + mask).softmax(-1)
        for listed, head, gamma in factors:
            if listed == layer:
                rest = (gamma - 1.0) * weights[:, head, :, :1] + 1.0
                weights[:, head, :, 0] *= gamma
                weights[:, head] /= rest
        return weights

    check_against_eager(ZeroTuning(factors=factors), edit)


def test_text_without_image_is_tuned_too() -> None:
    model, inputs = models.llava(), {"input_ids": torch.tensor([[1, 5, 6, 7, 8]])}
    plain, _, _ = generate(model, inputs)
    tuned, _, _ = generate(model, inputs, ZeroTuning(heads="0/1+2/3", gamma=4.0))
    assert (tuned[0] - plain[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": ((0, 1),)},
        {"factors": ((0, 1, 2.0),), "gamma": 2.0},
        {"factors": ((0, 1, 0.0),)},
        {"factors": ((0, 1, float("nan")),)},
        {"factors": "0/1"},
        {"heads": ((0, 1),), "gamma": -1.0},
    ],
)
def test_impossible_options(options: dict) -> None:
    with pytest.raises(UsageError, match=r"zerotuning|gamma="), attach(models.llava(), ZeroTuning(**options)):
        pass
