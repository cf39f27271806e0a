"""AD-HH's silenced heads, and how they are found."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from eager import Prompt, check_against_eager

from vislm import attach, registry
from vislm.errors import UsageError
from vislm.heads.ad_hh import ADHH, influence, top_heads
from vislm.lmm.artefacts import head_list

CONFIG = Path(__file__).parents[2] / "configs" / "heads" / "ad_hh" / "llava-1.5-7b.yaml"


def test_session_equals_explicit_matrices() -> None:
    silenced = []

    def edit(logits, mask, layer):
        weights = (logits + mask).softmax(-1)
        for listed, head in ((0, 1), (0, 3), (2, 2)):
            for row in range(Prompt.length - 1, logits.shape[2]):
                if listed == layer and weights[0, head, row, Prompt.end :].sum() >= 0.3:
                    weights[:, head, row, Prompt.end :] = 0.0
                    silenced.append((layer, head, row))
        return weights

    check_against_eager(ADHH(heads=((2, 2), (0, 3), (0, 1)), threshold=0.3), edit)
    assert 0 < len(set(silenced)) < 3 * 8


def test_heads_are_required_and_checked() -> None:
    for method, message in (
        (ADHH(), "ad_hh needs heads="),
        (ADHH(heads=((5, 0),)), r"\(5, 0\) lies outside the model, which has 5 layers of 4 heads"),
        (ADHH(heads="1/9"), r"\(1, 9\) lies outside"),
        (ADHH(heads=((0, 1),), threshold=-1.0), "threshold=-1.0"),
    ):
        with pytest.raises(UsageError, match=message), attach(models.llava(), method):
            pass


def test_the_published_list_is_a_config() -> None:
    method = registry.build("heads", str(CONFIG))
    assert isinstance(method, ADHH)
    model = models.llava(layers=32, heads=32, kv_heads=32)
    with attach(model, method) as session:
        heads = head_list(method.heads or (), session.adapter, ("ad_hh",))
    assert sum(map(len, heads.values())) == 20
    assert heads[26] == (9, 28)


def test_influence_is_that_on_hallucinated_words_minus_that_on_correct_ones() -> None:
    probability = torch.tensor([0.5, 0.7, 0.9])
    without = probability[:, None, None].repeat(1, 2, 2)
    without[0, 1, 0] = 0.1  # the head (1, 0) makes the hallucinated word likelier by 0.4
    without[2, 1, 0] = 0.7  # and one of two correct words by 0.2
    effect = influence(probability, without, torch.tensor([True, False, False]))
    torch.testing.assert_close(effect, torch.tensor([[0.0, 0.0], [0.3, 0.0]]))
    assert top_heads(effect, 2) == [(1, 0), (0, 0)]
    with pytest.raises(UsageError, match="both kinds"):
        influence(probability, without, torch.tensor([False, False, False]))
