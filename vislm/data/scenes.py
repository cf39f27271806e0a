"""Procedural scenes with object annotations: the data of the embedded demonstration model.

A hidden theme makes categories occur together (so that a model may learn to hallucinate), while background, colours
and positions tell nothing about the theme. Faint and partly hidden objects count as present.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image, ImageDraw

from vislm.data.coco_export import write_coco
from vislm.data.scene_categories import CATEGORIES, EXTRA_PROBABILITY, THEMES, UNIVERSALS
from vislm.data.scene_types import (
    COLOURS,
    DIFFICULTIES,
    EASY,
    HARD,
    HARD2,
    IMAGE_SIZE,
    Difficulty,
    Distribution,
    Instance,
    Scene,
    get_difficulty,
)
from vislm.data.shapes import Colour, draw_shape
from vislm.errors import UnknownName, UsageError

__all__ = [
    "COLOURS",
    "DIFFICULTIES",
    "EASY",
    "HARD",
    "HARD2",
    "IMAGE_SIZE",
    "Difficulty",
    "Instance",
    "Scene",
    "co_occurrence",
    "draw_scene",
    "generate_scenes",
    "sample_scene",
    "write_scenes",
]

MAX_INSTANCES = 6
MAX_RADIUS = 8.5
_GRID = 4
_JITTER = 2.5
_SUPERSAMPLING = 2
_COUNT_PROBABILITIES = (0.60, 0.86)
"""Cumulative chances of one and of at most two instances of a category; three otherwise."""


def generate_scenes(
    n: int,
    seed: int,
    *,
    difficulty: str | Difficulty = "hard2",
    distribution: Distribution = "biased",
    start: int = 0,
) -> Iterator[Scene]:
    """Yield ``n`` scenes, ``start`` first; scene ``i`` depends on the seed and ``i`` alone, not on ``n``.

    Args:
        n: number of scenes.
        seed: non-negative seed of the whole sequence.
        difficulty: ``"easy"``, ``"hard"``, ``"hard2"`` or a :class:`Difficulty`.
        distribution: ``"biased"`` (hidden themes) or ``"flat"`` (one to four categories, uniform).
        start: index of the first scene.

    Raises:
        UsageError: for a negative number or an unknown name.
    """
    for name, value in (("n", n), ("seed", seed), ("start", start)):
        if value < 0:
            raise UsageError(f"{name} is {value}; expected 0 or more")
    level = get_difficulty(difficulty)
    if distribution not in get_args(Distribution):
        raise UnknownName("distribution", distribution, get_args(Distribution))
    return (
        sample_scene(np.random.default_rng((seed, index)), level, distribution, index)
        for index in range(start, start + n)
    )


def sample_scene(
    rng: np.random.Generator, difficulty: Difficulty, distribution: Distribution = "biased", index: int = 0
) -> Scene:
    """Return one scene drawn from ``rng``, which is advanced."""
    theme, present = _flat_categories(rng) if distribution == "flat" else _biased_categories(rng)
    grey = rng.uniform(45, 150)
    background = _colour(np.clip(grey + rng.uniform(-30, 30, 3), 10, 190))
    instances = tuple(_instances(rng, present, difficulty))
    return Scene(index, draw_scene(background, instances, difficulty.noise, rng), theme, background, instances)


def draw_scene(background: Colour, instances: Iterable[Instance], noise: int, rng: np.random.Generator) -> Image.Image:
    """Return the 64 x 64 RGB picture of the instances, drawn in the order given at twice the size and box-filtered."""
    scale = _SUPERSAMPLING
    canvas = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), background)
    draw = ImageDraw.Draw(canvas)
    for item in instances:
        centre = (item.x * scale, item.y * scale)
        draw_shape(draw, item.category, centre, item.r * scale, item.rgb, background, item.contrast)
        if item.occluder is not None:
            x, y, radius = (scale * value for value in item.occluder)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=background)
    pixels = np.asarray(canvas.reduce(scale), dtype=np.int16)
    pixels = pixels + rng.integers(-noise, noise, size=pixels.shape, dtype=np.int16, endpoint=True)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def co_occurrence(scenes: Iterable[Scene]) -> np.ndarray:
    """Return the integer matrix ``(16, 16)`` of scenes that show both categories; the diagonal counts each category.

    Rows and columns are in the order of ``CATEGORIES``.
    """
    counts = np.zeros((len(CATEGORIES), len(CATEGORIES)), dtype=np.int64)
    for scene in scenes:
        present = [CATEGORIES.index(name) for name in scene.present]
        counts[np.ix_(present, present)] += 1
    return counts


def write_scenes(
    out: str | os.PathLike[str],
    n: int,
    seed: int,
    *,
    difficulty: str | Difficulty = "hard2",
    distribution: Distribution = "biased",
) -> Path:
    """Write ``n`` scenes as ``images/*.png``, ``instances.json`` and ``captions.json`` (COCO formats).

    Each image record also has ``theme``; each annotation ``colour``, ``contrast`` and ``occluded``. The two JSON files
    are written last and atomically. Returns the folder; arguments and errors as in :func:`generate_scenes`.
    """
    level = get_difficulty(difficulty)
    scenes = generate_scenes(n, seed, difficulty=level, distribution=distribution)
    info = {"n": n, "seed": seed, "difficulty": level.name, "distribution": distribution}
    return write_coco(Path(out), scenes, info)


def _colour(values: np.ndarray) -> Colour:
    red, green, blue = (int(value) for value in np.rint(values))
    return red, green, blue


def _flat_categories(rng: np.random.Generator) -> tuple[None, list[str]]:
    picked = rng.permutation(len(CATEGORIES))[: rng.integers(1, 5)]
    return None, [CATEGORIES[k] for k in picked]


def _biased_categories(rng: np.random.Generator) -> tuple[str, list[str]]:
    names, weights = list(THEMES), [weight for weight, _ in THEMES.values()]
    theme = names[int(rng.choice(len(names), p=weights))]
    own = THEMES[theme][1]
    chances = {**own, **UNIVERSALS}
    present = [name for name, popularity in chances.items() if rng.random() < popularity]
    if rng.random() < EXTRA_PROBABILITY:
        others = [name for name in CATEGORIES if name not in own and name not in present]
        if others:
            present.append(others[rng.integers(len(others))])
    return theme, present or [list(own)[rng.integers(len(own))]]


def _instances(rng: np.random.Generator, present: list[str], difficulty: Difficulty) -> Iterator[Instance]:
    first, extras = list(present), []
    for name in present:
        chance = rng.random()
        extras += [name] * sum(chance >= bound for bound in _COUNT_PROBABILITIES)
    rng.shuffle(first)
    rng.shuffle(extras)
    names = (first + extras)[:MAX_INSTANCES]
    rng.shuffle(names)
    colour_names = list(COLOURS)
    colours = {name: colour_names[rng.integers(len(colour_names))] for name in present}
    cells = rng.permutation(_GRID * _GRID)[: len(names)]
    for name, cell in zip(names, cells, strict=True):
        yield _instance(rng, name, colours[name], divmod(int(cell), _GRID), difficulty)


def _instance(
    rng: np.random.Generator, category: str, colour: str, cell: tuple[int, int], difficulty: Difficulty
) -> Instance:
    row, column = cell
    side = IMAGE_SIZE / _GRID
    radius = rng.uniform(difficulty.min_radius, MAX_RADIUS)
    x, y = (
        min(max((position + 0.5) * side + rng.uniform(-_JITTER, _JITTER), radius), IMAGE_SIZE - radius)
        for position in (column, row)
    )
    rgb = _colour(np.clip(np.asarray(COLOURS[colour]) + rng.uniform(-18, 18, 3), 0, 255))
    contrast = rng.uniform(*difficulty.faint_contrast) if rng.random() < difficulty.faint else 1.0
    occluder = None
    if rng.random() < difficulty.occluded:
        angle, size = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 0.8)
        occluder = (x + 0.65 * radius * math.cos(angle), y + 0.65 * radius * math.sin(angle), size * radius)
    return Instance(category, colour, x, y, radius, rgb, contrast, occluder)
