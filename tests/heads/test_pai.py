"""PAI's boost and guidance."""

from __future__ import annotations

import math

import models
import pytest
import torch
from eager import Prompt, check_against_eager, eager_logits, plain
from hypothesis import given
from hypothesis import strategies as st
from running import generate, one_image

from vislm import attach
from vislm.errors import UsageError
from vislm.heads.pai import PAI, boost, guide
from vislm.lmm.interventions import EditStage, LogitsStage, LogitsView


def test_session_equals_explicit_matrices() -> None:
    def edit(logits, mask, layer):
        changed = logits.clone()
        if layer in (1, 3):
            for row in range(Prompt.length - 1, logits.shape[2]):
                part = logits[:, :, row, Prompt.start : Prompt.end]
                changed[:, :, row, Prompt.start : Prompt.end] = part + 0.5 * part.abs()
        return (changed + mask).softmax(-1)

    check_against_eager(PAI(alpha=0.5, gamma=1.0, layers=(1, 3)), edit)


def test_negative_logits_move_towards_zero() -> None:
    logits = torch.tensor([[[[-2.0, 2.0, -2.0]]]])
    boosted = boost(logits, torch.tensor([[True, True, False]]), 0.25)
    assert boosted.flatten().tolist() == [-1.5, 2.5, -2.0]


@given(seed=st.integers(0, 99), gamma=st.sampled_from([1.0, 1.1, 2.0]), cutoff=st.sampled_from([0.0, 0.1]))
def test_guidance_token_by_token(seed: int, gamma: float, cutoff: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, text = torch.randn(2, 12, generator=generator) * 3, torch.randn(2, 12, generator=generator) * 3
    scores = guide(logits, text, gamma, cutoff)
    for b in range(2):
        p, q = logits[b].softmax(-1), text[b].softmax(-1)
        for token in range(12):
            if gamma != 1.0 and p[token] < cutoff * p.max():
                assert scores[b, token] == -math.inf
            else:
                expected = gamma * (p[token] / q[token]).log() + q[token].log()
                assert scores[b, token].item() == pytest.approx(expected.item(), abs=1e-4)


def test_stages_and_published_layers() -> None:
    with attach(models.llava(layers=5), PAI(gamma=1.0)) as session:
        ((_, stage),) = session.plan.edits
    assert isinstance(stage, EditStage)
    assert stage.layers == frozenset(range(5))
    stages = PAI(alpha=0.0, gamma=2.0).plan(session.adapter)
    assert [type(s) for s in stages] == [LogitsStage]
    assert stages[0].contrast == "text_only"


def test_guidance_leaves_samples_without_image_alone() -> None:
    logits, text = torch.randn(2, 9), torch.randn(2, 9)
    view = LogitsView(logits, text, {}, "decode", torch.tensor([True, False]), {})
    scores = PAI(gamma=2.0).adjust(view)
    assert torch.equal(scores[1], logits[1])
    assert torch.equal(scores[0], guide(logits[0], text[0], 2.0))


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"alpha": math.nan}, {"gamma": math.inf}, {"cutoff": 1.0}])
def test_impossible_options(options: dict) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))}="), attach(models.llava(), PAI(**options)):
        pass


def test_guided_session_equals_two_explicit_runs() -> None:
    """The edited run with the image, an untouched one of the prompt without it, and their mixture."""
    model, inputs = models.llava(), one_image("llava")

    def edit(logits, mask, layer):
        changed = logits.clone()
        part = logits[:, :, Prompt.length - 1 :, Prompt.start : Prompt.end]
        changed[:, :, Prompt.length - 1 :, Prompt.start : Prompt.end] = part + 0.5 * part.abs()
        return (changed + mask).softmax(-1)

    logits, out, _ = generate(model, inputs, PAI(alpha=0.5, gamma=2.0), max_new_tokens=8)
    for step in range(8):
        ids = out.sequences[:, : Prompt.length + step]
        text = ids[ids != models.IMAGE_TOKEN][None]
        with_image = eager_logits(model, inputs, ids, edit)
        without = eager_logits(model, {}, text, plain)
        torch.testing.assert_close(logits[step], guide(with_image, without, 2.0), atol=1e-3, rtol=1e-4)
