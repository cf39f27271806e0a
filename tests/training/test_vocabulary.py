"""Tokenizer, chat template and processor of vislm-tiny."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vislm.data.scene_categories import CATEGORIES
from vislm.data.scenes import generate_scenes
from vislm.data.turns import caption_turn, colour_turn, count_turn, plural, presence_turn
from vislm.training.tiny.pixels import to_pixels
from vislm.training.tiny.vocabulary import EOS, IDS, IMAGE, PAD, SPECIAL, UNKNOWN, build_processor, encode

QUESTION = "is there a dog in the image ?"


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_the_vocabulary_is_frozen() -> None:
    assert len(IDS) == 85
    assert [IDS[name] for name in SPECIAL] == [PAD, 1, EOS, UNKNOWN, IMAGE] == [0, 1, 2, 3, 4]
    assert list(IDS)[5:] == sorted(list(IDS)[5:])
    assert {*CATEGORIES, *map(plural, CATEGORIES)} <= set(IDS)


def test_lookup_and_tokenizer_agree(processor) -> None:
    tokenizer = processor.tokenizer
    for scene in generate_scenes(30, 2):
        turns = [presence_turn(scene, "cup"), count_turn(scene, "fish"), colour_turn(scene, scene.present[0])]
        for turn in (*turns, caption_turn(scene)):
            for text in (turn.question, turn.answer):
                assert tokenizer(text, add_special_tokens=False).input_ids == encode(text)
                assert tokenizer.decode(encode(text)) == text
    assert tokenizer("</s> <pad> <s>").input_ids == [EOS, PAD, 1]
    assert tokenizer("a zebra").input_ids == [IDS["a"], UNKNOWN]


@pytest.mark.parametrize(
    "text", ["Is there a dog in the image?", "IS THERE  a dog in\tthe image ?", "is there a dog in the image?\n"]
)
def test_people_need_not_write_like_the_training_data(processor, text: str) -> None:
    assert processor.tokenizer(text).input_ids == encode(QUESTION)
    assert processor.tokenizer("A cup, a fork and a dog.").input_ids == encode("a cup , a fork and a dog .")


def _user(text: str, image: bool = True) -> dict:
    picture = [{"type": "image"}] if image else []
    return {"role": "user", "content": [*picture, {"type": "text", "text": text}]}


def test_chat_template(processor) -> None:
    first = processor.apply_chat_template([_user(QUESTION)], add_generation_prompt=True)
    assert first.split() == f"<s> user : <image> {QUESTION} assistant :".split()
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes ."}]}
    talk = [_user(QUESTION), answer, _user("where is the dog ?", image=False)]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert text.split() == [*first.split(), *"yes . </s> user : where is the dog ? assistant :".split()]
    assert processor.apply_chat_template(talk[:2]).split() == [*first.split(), *"yes . </s>".split()]


def test_an_image_becomes_64_tokens_and_the_pixels_of_training(processor) -> None:
    scene = next(generate_scenes(1, 9))
    text = processor.apply_chat_template([_user(QUESTION)], add_generation_prompt=True)
    inputs = processor(images=scene.image, text=text, return_tensors="pt")
    ids = [*encode("<s> user :"), *[IMAGE] * 64, *encode(QUESTION), *encode("assistant :")]
    assert inputs.input_ids.tolist() == [ids]
    torch.testing.assert_close(inputs.pixel_values, to_pixels([scene.image]), rtol=0, atol=1e-5)


def test_larger_images_are_squeezed_and_batches_padded_on_the_left(processor) -> None:
    images = [Image.fromarray(np.full((h, w, 3), 90, np.uint8)) for h, w in ((64, 64), (200, 90))]
    texts = [
        processor.apply_chat_template([_user(q)], add_generation_prompt=True)
        for q in (QUESTION, "describe the image .")
    ]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    assert inputs.pixel_values.shape == (2, 3, 64, 64)
    assert inputs.attention_mask[1].tolist().index(1) == len(encode(QUESTION)) - 4
    assert (inputs.input_ids == IMAGE).sum(1).tolist() == [64, 64]
