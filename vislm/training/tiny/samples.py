"""Endless training samples: which scene, which turns, with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vislm.data.scene_categories import CATEGORIES
from vislm.data.scene_types import Difficulty, Distribution, Scene
from vislm.data.scenes import generate_scenes
from vislm.data.turns import (
    Turn,
    caption_turn,
    colour_turn,
    count_turn,
    position_turn,
    presence_turn,
    singletons,
)


@dataclass(frozen=True)
class Weighted:
    """A turn and the weights of its answer's first token and of the later ones (end token included).

    ``later`` None: only the first token is an answer, neither full stop nor end token follow.
    """

    turn: Turn
    first: float = 1.0
    later: float | None = 0.2


@dataclass(frozen=True)
class Mixture:
    """Which scenes a stage draws: chances of each (difficulty, distribution), of easy-vqa, and the kinds of turns."""

    scenes: tuple[tuple[float, Difficulty, Distribution], ...]
    easy_vqa: float = 0.0
    present: int = 4
    """Present categories asked about in a mixed turn set."""
    absent: int = 2


def draw_scene(mixture: Mixture, stream: int, number: int, rng: np.random.Generator) -> Scene:
    """Return scene ``number`` of a stream, its difficulty and distribution drawn from ``rng``."""
    chances = np.array([chance for chance, _, _ in mixture.scenes])
    _, difficulty, distribution = mixture.scenes[int(rng.choice(len(chances), p=chances / chances.sum()))]
    return next(generate_scenes(1, stream, difficulty=difficulty, distribution=distribution, start=number))


def all_presence(scene: Scene) -> list[Weighted]:
    """Return all 16 yes/no turns; present and absent categories weigh 8 together each."""
    n = len(scene.present)
    return [
        Weighted(presence_turn(scene, c), 8 / n if c in scene.present else 8 / (len(CATEGORIES) - n), None)
        for c in CATEGORIES
    ]


def dense(scene: Scene, rng: np.random.Generator, caption: bool) -> list[Weighted]:
    """Return every colour, count and position, one zero count, one yes and one no, and the caption if wanted."""
    turns = [f(scene, c) for c in scene.present for f in (colour_turn, count_turn)]
    turns.append(count_turn(scene, _pick(scene.absent, 1, rng)[0]))
    turns += [position_turn(scene, c) for c in singletons(scene)]
    turns += [presence_turn(scene, _pick(names, 1, rng)[0]) for names in (scene.present, scene.absent)]
    return [Weighted(t) for t in turns] + ([_caption(scene)] if caption else [])


def mixed(scene: Scene, rng: np.random.Generator, present: int, absent: int) -> list[Weighted]:
    """Return some yes/no turns, two counts, two colours, up to two positions and the caption."""
    turns = [presence_turn(scene, c) for c in _pick(scene.present, present, rng)]
    turns += [presence_turn(scene, c) for c in _pick(scene.absent, absent, rng)]
    turns += [count_turn(scene, _pick(scene.present if rng.random() < 0.85 else scene.absent, 1, rng)[0]) for _ in "12"]
    turns += [colour_turn(scene, c) for c in _pick(scene.present, 2, rng)]
    turns += [position_turn(scene, c) for c in _pick(singletons(scene), 2, rng)]
    return [Weighted(t) for t in turns] + [_caption(scene)]


def first_phase(scene: Scene, rng: np.random.Generator) -> list[Weighted]:
    """Return the turns of one image in stage B1."""
    kind = rng.random()
    turns = all_presence(scene) if kind < 0.4 else dense(scene, rng, caption=kind < 0.7)
    return [turns[i] for i in rng.permutation(len(turns))]


class EasyVqa:
    """The training images and questions of the PyPI package easy-vqa (MIT), one shape per image."""

    def __init__(self) -> None:
        try:
            from easy_vqa import get_train_image_paths, get_train_questions
        except ImportError as error:
            from vislm.errors import UsageError

            raise UsageError("training uses the images of easy-vqa: pip install easy-vqa") from error
        self.paths: dict[int, str] = get_train_image_paths()
        questions, answers, images = get_train_questions()
        self.turns: dict[int, list[Turn]] = {}
        for question, answer, image in zip(questions, answers, images, strict=True):
            text = question.lower().replace("?", " ?").strip()
            self.turns.setdefault(int(image), []).append(Turn("vqa", text, f"{answer} ."))
        self.keys = sorted(self.turns)

    def draw(self, rng: np.random.Generator) -> tuple[Image.Image, list[Weighted]]:
        """Return a random image and up to nine of its questions."""
        key = self.keys[int(rng.integers(len(self.keys)))]
        with Image.open(self.paths[key]) as image:
            picture = image.convert("RGB")
        return picture, [Weighted(t) for t in _pick(self.turns[key], 9, rng)]


def _caption(scene: Scene) -> Weighted:
    return Weighted(caption_turn(scene), 0.5, 0.5)


def _pick(names: Sequence, n: int, rng: np.random.Generator) -> list:
    return [names[i] for i in rng.permutation(len(names))[:n]]
