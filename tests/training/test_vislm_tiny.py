"""The shipped weights: they load from the package, answer the same in a batch as alone, and look at the picture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vislm.data.scene_types import Scene
from vislm.data.scenes import generate_scenes
from vislm.data.turns import caption_turn, colour_turn, count_turn, presence_turn
from vislm.lmm.loading import EMBEDDED
from vislm.training.tiny import development
from vislm.training.tiny.pixels import to_pixels

FOLDER = EMBEDDED["vislm-tiny"]
UNSEEN = 24_680_111
"""Seed of scenes that neither training, development nor the published figures use."""


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


def _questions(scenes: list[Scene]) -> list[str]:
    make = (caption_turn, lambda s: colour_turn(s, s.present[0]), lambda s: count_turn(s, s.present[-1]))
    turns = [make[k % 3](scene) for k, scene in enumerate(scenes)]
    return [turn.question for turn in turns]


def _inputs(processor: Any, scenes: list[Scene], questions: list[str]) -> Any:
    talks = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question in questions
    ]
    texts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    return processor(images=[scene.image for scene in scenes], text=texts, return_tensors="pt", padding=True)


def _answers(model: Any, processor: Any, scenes: list[Scene], questions: list[str]) -> list[str]:
    inputs = _inputs(processor, scenes, questions)
    ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)[:, inputs.input_ids.shape[1] :]
    return processor.batch_decode(ids, skip_special_tokens=True)


def test_the_file_is_small_and_holds_each_tensor_once() -> None:
    from safetensors import safe_open

    path = Path(FOLDER) / "model.safetensors"
    assert path.stat().st_size < 3_500_000
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        assert "lm_head.weight" not in names
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}


@pytest.mark.slow
def test_a_batch_of_eight_answers_as_eight_singles(model: Any, processor: Any) -> None:
    scenes = list(generate_scenes(8, UNSEEN))
    questions = _questions(scenes)
    together = _answers(model, processor, scenes, questions)
    singly = [_answers(model, processor, [s], [q])[0] for s, q in zip(scenes, questions, strict=True)]
    assert together == singly
    assert together[0].startswith("there is")


@pytest.mark.slow
def test_generation_is_the_argmax_of_one_forward_pass(model: Any, processor: Any) -> None:
    for scene in generate_scenes(6, UNSEEN, start=50):
        inputs = _inputs(processor, [scene], ["describe the image ."])
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs.pixel_values, attention_mask=torch.ones_like(ids)).logits
        start = inputs.input_ids.shape[1]
        assert ids[0, -1] == model.config.text_config.eos_token_id
        assert logits[0, start - 1 : -1].argmax(-1).tolist() == ids[0, start:].tolist()


@pytest.mark.slow
def test_half_precision_says_nearly_the_same(model: Any, processor: Any) -> None:
    from transformers import AutoModelForImageTextToText

    half = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.bfloat16, local_files_only=True).eval()
    scenes = list(generate_scenes(8, UNSEEN, start=100))
    questions = [presence_turn(scene, scene.present[0]).question for scene in scenes]
    inputs = _inputs(processor, scenes, questions)
    with torch.no_grad():
        full = model(**inputs).logits[:, -1]
        low = half(**{**inputs, "pixel_values": inputs.pixel_values.to(torch.bfloat16)}).logits[:, -1].float()
    assert (full - low).abs().max() < 0.05 * full.abs().max()


@pytest.mark.slow
def test_the_model_is_grounded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that only knew which categories occur together would reach .64 on the adversarial questions."""
    monkeypatch.setattr(development, "SEED", UNSEEN)
    monkeypatch.setattr(development, "SCENES", 200)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        return model.model.multi_modal_projector(hidden[:, 1:])

    trainer: Any = SimpleNamespace(model=model, features=features)
    figures = development.Development().measure(trainer)
    assert figures["flat_auroc"] > 0.99
    assert figures["adversarial_auroc"] > 0.94
    assert 0.82 < figures["adversarial_accuracy"] < 0.95
    assert figures["colour"] > 0.92
    assert figures["position"] > 0.90
    assert figures["count"] > 0.70  # of present categories only: zero is never the answer


def test_a_grey_picture_shows_nothing(model: Any, processor: Any) -> None:
    from PIL import Image

    grey = Image.new("RGB", (64, 64), (100, 100, 100))
    scene = Scene(0, grey, None, (100, 100, 100), ())
    assert to_pixels([grey]).shape == (1, 3, 64, 64)
    assert _answers(model, processor, [scene], ["is there a cup in the image ?"]) == ["no ."]
