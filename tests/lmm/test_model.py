"""Questions in plain text to the embedded model."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vislm import VHR, FastV, FlowCut, RandomPruning, load_lmm
from vislm.data.scenes import generate_scenes
from vislm.errors import ImageError, UsageError

QUESTIONS = [
    "Is there a dog in the image?",
    "Describe the image.",
    "How many stars are there?",
    "What color is the car?",
]
METHODS = {
    "none": (),
    "random": (RandomPruning(keep=16),),
    "flowcut": (FlowCut(keep=16),),
    "fastv": (FastV(keep=16),),
    "vhr": (VHR(alpha=2.0),),
    "flowcut+vhr": (FlowCut(keep=16), VHR(alpha=1.5)),
}


@pytest.fixture(scope="module")
def lmm():
    return load_lmm()


@pytest.fixture(scope="module")
def scenes():
    return [s.image for s in generate_scenes(8, 4711)]


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_eight_equals_eight_singles(lmm, scenes, method) -> None:
    questions = (QUESTIONS * 2)[:8]
    with lmm.using(*METHODS[method]):
        together = lmm.ask_many(scenes, questions, candidates=("yes", "no"))
        alone = [lmm.ask_many([s], [q], candidates=("yes", "no"))[0] for s, q in zip(scenes, questions, strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert a.text == b.text
        assert a.visual_tokens == b.visual_tokens == 64
        assert (
            a.visual_tokens_kept
            == b.visual_tokens_kept
            == (16 if method in ("random", "flowcut", "fastv", "flowcut+vhr") else 64)
        )
        assert a.candidates["yes"] == pytest.approx(b.candidates["yes"], abs=1e-4)


def test_generation_equals_teacher_forced_argmax(lmm, scenes) -> None:
    for image, question in zip(scenes, QUESTIONS * 2, strict=True):
        inputs = lmm.prepare([image], [question])
        out = lmm.model.generate(**inputs, do_sample=False, max_new_tokens=40)
        start = inputs["input_ids"].shape[1]
        with torch.no_grad():
            logits = lmm.model(
                input_ids=out, attention_mask=torch.ones_like(out), pixel_values=inputs["pixel_values"]
            ).logits
        assert torch.equal(logits[0, start - 1 : -1].argmax(-1), out[0, start:])


def test_bfloat16_answers(scenes) -> None:
    half = load_lmm(dtype="bfloat16")
    with half.using(FlowCut(keep=16), VHR()):
        assert half.ask(scenes[0], QUESTIONS[0]) in ("yes .", "no .")


def test_no_image_several_images_and_beams(lmm, scenes) -> None:
    assert isinstance(lmm.ask(None, "is there a dog in the image ?"), str)
    answers = lmm.ask_many([scenes[:2], None, scenes[2]], QUESTIONS[:3], num_beams=2, candidates=("yes",))
    assert [a.visual_tokens for a in answers] == [128, 0, 64]
    with lmm.using(FlowCut(keep=8)):
        answers = lmm.ask_many([scenes[:2], None, scenes[2]], QUESTIONS[:3], num_beams=2)
    assert [a.visual_tokens_kept for a in answers] == [16, 0, 8]
    assert lmm.last_run.batch == 6


def test_interventions_end_with_their_context(lmm, scenes) -> None:
    before = lmm.ask_many(scenes, QUESTIONS * 2, candidates=("yes", "no"))
    with lmm.using(FlowCut(keep=4)), lmm.using(VHR(alpha=3.0)):
        assert len(lmm.fingerprint()["interventions"]) == 2
        inside = lmm.ask_many(scenes, QUESTIONS * 2, candidates=("yes", "no"))
    assert lmm.fingerprint()["interventions"] == []
    after = lmm.ask_many(scenes, QUESTIONS * 2, candidates=("yes", "no"))
    assert [a.candidates for a in before] == [a.candidates for a in after] != [a.candidates for a in inside]


def test_broken_images_are_named(lmm, tmp_path, scenes) -> None:
    missing, text, cut = tmp_path / "missing.png", tmp_path / "text.jpg", tmp_path / "cut.jpg"
    text.write_text("no picture")
    Image.new("RGB", (300, 300), "red").save(cut)
    cut.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(ImageError, match=r"missing\.png: no such file"):
        lmm.ask(missing, "?")
    with pytest.raises(ImageError, match=r"text\.jpg: not an image"):
        lmm.ask(text, "?")
    with pytest.raises(ImageError, match=r"cut\.jpg: cannot be decoded"):
        lmm.ask(cut, "?")
    assert lmm.ask(scenes[0], QUESTIONS[0])


@pytest.mark.parametrize(
    ("images", "questions", "options", "message"),
    [
        ([None], ["a", "b"], {}, "1 images for 2 questions"),
        ([], [], {}, "0 questions"),
        ([None], ["a"], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([None], ["a"], {"candidates": ("zeppelin",)}, "not a word of the model's vocabulary"),
    ],
)
def test_impossible_calls(lmm, images, questions, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        lmm.ask_many(images, questions, **options)


def test_forty_rounds_leave_nothing_behind(lmm, scenes) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lmm.model.modules())

    lmm.ask(scenes[0], QUESTIONS[0])
    before = hooks()
    for _ in range(40):
        with lmm.using(FlowCut(keep=8), VHR()):
            lmm.ask(scenes[0], QUESTIONS[0], max_new_tokens=1)
    assert hooks() == before
