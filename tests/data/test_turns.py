"""Questions and answers about scenes."""

from __future__ import annotations

import pytest
from PIL import Image

from vislm.data.scene_categories import CATEGORIES
from vislm.data.scene_types import Instance, Scene
from vislm.data.scenes import generate_scenes
from vislm.data.turns import (
    caption,
    caption_turn,
    colour_turn,
    count_turn,
    plural,
    position_turn,
    presence_turn,
    singletons,
)
from vislm.errors import UnknownName, UsageError


def _scene(*items: tuple[str, str, float, float]) -> Scene:
    instances = tuple(Instance(name, colour, x, y, 6.0, (0, 0, 0)) for name, colour, x, y in items)
    return Scene(0, Image.new("RGB", (64, 64)), "sky", (90, 90, 90), instances)


SCENE = _scene(("dog", "white", 10, 50), ("moon", "blue", 40, 8), ("star", "red", 56, 24), ("moon", "blue", 8, 8))


def test_caption_lists_categories_in_index_order() -> None:
    assert caption(SCENE) == "there is a red star , two blue moons and a white dog ."
    assert caption(_scene(("fish", "red", 8, 8), ("fish", "red", 24, 8))) == "there is two red fish ."
    assert caption(_scene(("cup", "red", 8, 8), ("ball", "green", 24, 8))) == "there is a red cup and a green ball ."
    assert caption_turn(SCENE).question == "describe the image ."


def test_turns_say_what_is_drawn() -> None:
    assert presence_turn(SCENE, "dog").question == "is there a dog in the image ?"
    assert presence_turn(SCENE, "dog").answer == "yes ."
    assert presence_turn(SCENE, "cup").answer == "no ."
    assert (count_turn(SCENE, "moon").question, count_turn(SCENE, "moon").answer) == (
        "how many moons are there ?",
        "two .",
    )
    assert count_turn(SCENE, "cup").answer == "zero ."
    assert colour_turn(SCENE, "star").question == "what color is the star ?"
    assert colour_turn(SCENE, "star").answer == "red ."
    assert position_turn(SCENE, "dog").question == "where is the dog ?"
    assert [position_turn(SCENE, name).answer for name in ("dog", "star")] == ["bottom left .", "top right ."]
    assert singletons(SCENE) == ["star", "dog"]


def test_questions_without_an_answer_are_refused() -> None:
    with pytest.raises(UsageError, match="no cup in the scene"):
        colour_turn(SCENE, "cup")
    for name, n in (("moon", 2), ("cup", 0)):
        with pytest.raises(UsageError, match=f"{n} instances of {name}"):
            position_turn(SCENE, name)
    with pytest.raises(UnknownName, match="'bird'"):
        plural("birdd")


def test_every_scene_can_be_asked_about_everything() -> None:
    for scene in generate_scenes(40, 4):
        words = caption(scene).split()
        for name in CATEGORIES:
            assert (presence_turn(scene, name).answer == "yes .") == (name in words or plural(name) in words)
        assert all(colour_turn(scene, name).answer.split()[0] in words for name in scene.present)
