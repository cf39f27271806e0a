"""Calibration samples: pictures with questions, and what is known about the right answer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vislm.data.scenes import generate_scenes
from vislm.data.turns import caption_turn, presence_turn
from vislm.errors import AnnotationError, UsageError
from vislm.files import sha256

SCENES = 80_000
"""Seed of the calibration scenes, plus the user's: far from those that trained, tested and tuned anything."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LIST = "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """A picture with a question."""

    image: Path | Image.Image
    question: str
    digest: str
    """Tells this sample from any other."""
    answer: str | None = None
    """The right one: a word."""
    objects: frozenset[str] | None = None
    """What the picture shows."""


def load_samples(source: str, count: int, seed: int, question: str, *, captions: bool) -> list[Sample]:
    """Return ``count`` samples, or all if there are fewer.

    Args:
        source: "scenes" for generated ones, or a folder: with a ``samples.jsonl`` of {"image", "question", "answer",
            "objects"} (all but the path, relative to the folder, may be left out), or with pictures, at any depth.
        count: how many; chosen at random by the seed.
        seed: of the choice, or of the scenes.
        question: about pictures that come without one.
        captions: ask about scenes for a caption, with their objects, instead of about one object, with yes or no.

    Raises:
        UsageError: no such folder, or nothing in it.
        AnnotationError: a list that cannot be read.
    """
    if source == "scenes":
        return list(_scenes(count, seed, captions))
    folder = Path(source)
    if not folder.is_dir():
        raise UsageError(f"--samples {source!r} is neither 'scenes' nor a folder")
    listed = folder / LIST
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    rows = _listed(listed) if listed.is_file() else [{"image": path} for path in pictures]
    if not rows:
        raise UsageError(f"{folder} holds no {LIST} and no pictures ({', '.join(PICTURES)})")
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    return [_sample(rows[number], question) for number in chosen]


def _scenes(count: int, seed: int, captions: bool) -> Iterator[Sample]:
    """Yield scenes; asked about objects, every other one is there."""
    for number, scene in enumerate(generate_scenes(count, SCENES + seed)):
        names = scene.absent if number % 2 else scene.present
        name = random.Random(f"{seed}/{number}").choice(names)
        turn = caption_turn(scene) if captions else presence_turn(scene, name)
        answer = None if captions else turn.answer.split()[0]
        digest = f"scene {SCENES + seed} {number} {turn.question}"
        yield Sample(scene.image, turn.question, digest, answer, frozenset(scene.present))


def _listed(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "image": path.parent / str(row["image"])})
        except (ValueError, TypeError, KeyError) as error:
            wanted = '{"image": ..., "question": ..., "answer": ..., "objects": [...]}'
            raise AnnotationError(f"{path}, line {number}: expected {wanted}, got {error!r}") from error
        if not rows[-1]["image"].is_file():
            raise AnnotationError(f"{path}, line {number}: there is no file {rows[-1]['image']}")
        if not isinstance(row.get("objects", []), list):
            raise AnnotationError(f"{path}, line {number}: objects is {row['objects']!r}; expected a list of names")
    return rows


def _sample(row: dict[str, Any], question: str) -> Sample:
    text, answer, objects = str(row.get("question", question)), row.get("answer"), row.get("objects")
    known = None if objects is None else frozenset(map(str, objects))
    digest = f"{sha256(row['image'])} {text} {answer} {sorted(known or ())}"
    return Sample(row["image"], text, digest, None if answer is None else str(answer), known)
