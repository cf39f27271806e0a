"""Calibration samples: pictures with questions. No answers are needed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vislm.data.scenes import generate_scenes
from vislm.data.turns import caption_turn, colour_turn, count_turn, presence_turn
from vislm.errors import AnnotationError, UsageError
from vislm.files import sha256

SCENES = 70_000
"""Seed of the calibration scenes, plus the user's: far from those that trained and tested the embedded model."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LIST = "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """A picture with a question."""

    image: Path | Image.Image
    question: str
    digest: str
    """Tells this sample from any other."""


def load_samples(source: str, count: int, seed: int, question: str = "Describe the image.") -> list[Sample]:
    """Return ``count`` samples, or all if there are fewer.

    Args:
        source: "scenes" for generated ones, or a folder: with a ``samples.jsonl`` of {"image", "question"} (paths
            relative to the folder), or with pictures, at any depth.
        count: how many; chosen at random by the seed.
        seed: of the choice, or of the scenes.
        question: about every picture of a folder that has no list.

    Raises:
        UsageError: no such folder, or nothing in it.
        AnnotationError: a list that cannot be read.
    """
    if source == "scenes":
        return list(_scenes(count, seed))
    folder = Path(source)
    if not folder.is_dir():
        raise UsageError(f"--samples {source!r} is neither 'scenes' nor a folder")
    listed = folder / LIST
    pairs = _listed(listed) if listed.is_file() else [(path, question) for path in _pictures(folder)]
    if not pairs:
        raise UsageError(f"{folder} holds no {LIST} and no pictures ({', '.join(PICTURES)})")
    chosen = sorted(random.Random(seed).sample(range(len(pairs)), min(count, len(pairs))))
    return [Sample(path, text, f"{sha256(path)} {text}") for path, text in (pairs[i] for i in chosen)]


def _scenes(count: int, seed: int) -> Iterator[Sample]:
    """Yield scenes with questions of four kinds in turn."""
    for number, scene in enumerate(generate_scenes(count, SCENES + seed)):
        category = scene.present[number % len(scene.present)]
        ask = (presence_turn, colour_turn, count_turn, lambda scene, _: caption_turn(scene))[number % 4]
        question = ask(scene, category).question
        yield Sample(scene.image, question, f"scene {SCENES + seed} {number} {question}")


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)


def _listed(path: Path) -> list[tuple[Path, str]]:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            pairs.append((path.parent / str(row["image"]), str(row["question"])))
        except (ValueError, TypeError, KeyError) as error:
            wanted = '{"image": ..., "question": ...}'
            raise AnnotationError(f"{path}, line {number}: expected {wanted}, got {error!r}") from error
        if not pairs[-1][0].is_file():
            raise AnnotationError(f"{path}, line {number}: there is no file {pairs[-1][0]}")
    return pairs
