"""SPIN's choice of heads."""

from __future__ import annotations

import models
import pytest
import torch
from eager import Prompt, check_against_eager
from hypothesis import given
from hypothesis import strategies as st

from vislm import attach
from vislm.errors import UsageError
from vislm.heads.spin import SPIN, head_factors


@pytest.mark.parametrize("score", ["logits_code", "attention_paper"])
def test_session_equals_explicit_matrices(score) -> None:
    def edit(logits, mask, layer):
        weights = (logits + mask).softmax(-1)
        measured = logits if score == "logits_code" else weights
        for row in range(Prompt.length - 1, logits.shape[2]):
            sums = measured[0, :, row, Prompt.start : Prompt.end].sum(-1)
            worst = sorted(range(4), key=lambda head: sums[head].item())[:2]
            weights[:, worst, row] *= 0.1
        return weights

    check_against_eager(SPIN(keep_ratio=0.5, suppressed_scale=0.1, score=score), edit)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.floats(0.0, 1.0))
def test_keeps_the_floor_of_the_ratio(scores: list[int], ratio: float) -> None:
    values = torch.tensor(scores, dtype=torch.float32)[None, :, None]
    factors = head_factors(values, ratio, 0.0).flatten()
    kept, lost = values.flatten()[factors == 1.0], values.flatten()[factors == 0.0]
    assert len(kept) == int(ratio * len(scores))
    assert not len(kept) or not len(lost) or kept.min() >= lost.max()


@pytest.mark.parametrize("options", [{"keep_ratio": 1.5}, {"suppressed_scale": -0.1}])
def test_impossible_options(options: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(options))), attach(models.llava(), SPIN(**options)):
        pass
