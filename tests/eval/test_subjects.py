"""How models answer samples: words, choices, several pictures, none."""

from __future__ import annotations

import math

import pytest

from vislm.errors import UnknownName, UsageError
from vislm.eval.protocol import Asked, Sample
from vislm.eval.running.likelihood import likelihoods
from vislm.eval.running.subjects import RULED_OUT, LmmSubject, open_subject

QUESTION = "is there a dog in the image ?"


@pytest.fixture(scope="module")
def lmm():
    from vislm.lmm.model import load_lmm

    return load_lmm()


@pytest.fixture(scope="module")
def pictures() -> list:
    from vislm.data.scenes import generate_scenes

    return [scene.image for scene in generate_scenes(3, 5)]


def asked(name: str, *images, **options) -> Asked:
    return Asked(Sample(name, (), QUESTION, **options), images)


def test_words_choices_and_free_answers_share_a_batch(lmm, pictures) -> None:
    batch = [
        asked("words", pictures[0], candidates=("yes", "no")),
        asked("choices", pictures[1], choices=("there is a cat", "yes", "no")),
        asked("free", pictures[2]),
        asked("blind"),
        asked("both", *pictures[:2]),
    ]
    rows = LmmSubject(lmm).respond(batch, max_new_tokens=4)
    assert set(rows[0]["candidates"]) == {"yes", "no"}
    assert rows[1]["text"] == batch[1].sample.choices[rows[1]["likelihoods"].index(max(rows[1]["likelihoods"]))]
    assert rows[2]["candidates"] == {}
    assert [row["visual_tokens"] for row in rows] == [64, 64, 64, 0, 128]
    assert rows[0]["flops"] > 0
    assert all(row["seconds"] > 0 for row in rows)


def test_a_word_that_is_ruled_out_has_a_finite_logit(lmm, pictures) -> None:
    from vislm.heads.vcd import VCD

    with lmm.using(VCD(alpha=1.0, beta=1.0)) as strict:  # only the likeliest word is left
        row = LmmSubject(strict).respond([asked("q", pictures[0], candidates=("yes", "no"))], max_new_tokens=2)[0]
    assert min(row["candidates"].values()) == RULED_OUT
    assert max(row["candidates"].values()) > RULED_OUT


def test_likelihoods_do_not_depend_on_the_batch(lmm, pictures) -> None:
    choices = [("yes", "no"), ("there is a dog", "there is a cat and a star", "yes"), ("a cat",)]
    together = likelihoods(lmm, pictures, [QUESTION] * 3, choices)
    alone = [likelihoods(lmm, [p], [QUESTION], [c])[0] for p, c in zip(pictures, choices, strict=True)]
    for (a, _), (b, _) in zip(together, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-3)
        assert all(value < 0 for value in a)


def test_likelihoods_are_those_of_the_models_logits(lmm, pictures) -> None:
    """Against one forward over the prompt and the whole choice."""
    import torch

    choice = "there is a dog"
    found = likelihoods(lmm, pictures[:1], [QUESTION], [(choice,)])[0][0][0]
    inputs = lmm.prepare(pictures[:1], [QUESTION])
    tokens = lmm.processor.tokenizer.encode(choice, add_special_tokens=False)
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        out = lmm.model(**{**inputs, "input_ids": ids, "attention_mask": mask})
    logits = out.logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
    expected = sum(float(logits[i, t]) for i, t in enumerate(tokens))
    assert found == pytest.approx(expected, abs=1e-3)


def test_methods_act_on_choices(lmm, pictures) -> None:
    from vislm import FlowCut

    plain = likelihoods(lmm, pictures[:1], [QUESTION], [("yes", "no")])[0]
    with lmm.using(FlowCut(keep=8)):
        pruned = likelihoods(lmm, pictures[:1], [QUESTION], [("yes", "no")])[0]
    assert pruned[1].visual_tokens_kept == 8
    assert not math.isclose(plain[0][0], pruned[0][0], abs_tol=1e-4)


def test_choices_need_words(lmm, pictures) -> None:
    with pytest.raises(UsageError, match="some without choices"):
        likelihoods(lmm, pictures[:1], [QUESTION], [()])
    with pytest.raises(UsageError, match="choice '' has no words"):
        likelihoods(lmm, pictures[:1], [QUESTION], [("",)])


def test_an_lmm_is_opened_with_its_methods() -> None:
    with open_subject("lmm", "vislm-tiny", ["flowcut:keep=16"], ["vhr:alpha=2"]) as subject:
        fingerprint = subject.fingerprint()
    assert [text.split("(")[0] for text in fingerprint["interventions"]] == ["FlowCut", "VHR"]
    assert len(fingerprint["preprocessing"]) == 16
    with pytest.raises(UnknownName, match="did you mean 'lmm'"):
        open_subject("lm", "vislm-tiny")


def test_the_fingerprint_changes_with_the_preprocessing(lmm) -> None:
    before = LmmSubject(lmm).fingerprint()["preprocessing"]
    processor = lmm.processor.image_processor
    mean = processor.image_mean
    try:
        processor.image_mean = [0.5, 0.5, 0.5]
        assert LmmSubject(lmm).fingerprint()["preprocessing"] != before
    finally:
        processor.image_mean = mean
    assert LmmSubject(lmm).fingerprint()["preprocessing"] == before


@pytest.mark.parametrize("arguments", [["list", "models"], ["eval", "--help"]])
def test_the_command_line_says_how_vision_models_are_named(arguments) -> None:
    from typer.testing import CliRunner

    from vislm.cli import app

    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert all(form in shown.output for form in ("NAME@FILE.safetensors", "NAME@pretrained", "NAME@random"))
