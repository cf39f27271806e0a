"""Where POPE's questions come from: published files, COCO annotations, or generated scenes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vislm.errors import AnnotationError, UnknownName, UsageError
from vislm.eval.coco import CocoFolder, has_coco_folder, read_coco_folder
from vislm.eval.questions.pope_build import PER_IMAGE, build, draw_images
from vislm.eval.questions.pope_questions import SPLITS, Question, read_questions
from vislm.eval.questions.scene_pope import scene_questions
from vislm.eval.reading import find_folder


@dataclass(frozen=True)
class Source:
    """Questions, the pictures that they are about, and what a result must say of their origin."""

    questions: Sequence[Question]
    paths: Mapping[str, Path]
    """Image name -> file."""
    how: str
    objects: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of scenes: what the oracles know."""
    themes: Mapping[str, str | None] = field(default_factory=dict)


SOURCES = ("auto", "files", "coco", "scenes")


def find_questions(
    root: Path, *, source: str, files: str, coco: str, draw: int | None, seed: int, faults: list[str]
) -> Source:
    """Read or build the questions of a folder; the arguments are those of :func:`vislm.eval.questions.pope.load`."""
    if source not in SOURCES:
        raise UnknownName("source of POPE's questions", source, SOURCES)
    if not root.is_dir():
        raise AnnotationError(f"the folder {root} does not exist")
    built = has_coco_folder(root, coco) and (draw is not None or not _question_files(root, files))
    if source == "auto" and (files or not built):
        source = "files"
    if source == "files":
        if draw is not None:
            raise UsageError(f"draw={draw} is for questions that are built from COCO annotations; use --limit")
        return _from_files(root, files, coco, faults)
    folder = read_coco_folder(root, coco, faults)
    if not folder.images and not faults:
        raise AnnotationError(f"{root} holds no images")
    if source == "scenes" or (source == "auto" and folder.is_scenes and draw is None):
        return _from_scenes(folder, seed)
    return _from_coco(folder, draw, seed, faults)


def _from_files(root: Path, files: str, coco: str, faults: list[str]) -> Source:
    found = _question_files(root, files)
    if not found:
        raise AnnotationError(
            f"{root} holds no POPE questions; expected {files or 'coco_pope_random.json, ... (JSON lines), or'} "
            f"{'' if files else f'COCO annotations: instances.json or annotations/instances_{coco}.json'}".rstrip()
        )
    questions = [question for file in found for question in read_questions(file, faults=faults)]
    images = list(dict.fromkeys(q.image for q in questions))
    place = {name: number for number, name in enumerate(images)}
    folder = find_folder(root, ["images", coco])
    how = f"official files {', '.join(file.name for file in found)}"
    return Source(sorted(questions, key=lambda q: place[q.image]), {name: folder / name for name in images}, how)


def _question_files(root: Path, files: str) -> list[Path]:
    """Return the files of the splits, or one file of all splits such as LLaVA's llava_pope_test.jsonl.

    Raises:
        AnnotationError: several files of one split, e.g. about COCO and about A-OKVQA.
    """
    if files:
        return sorted(root.glob(files))
    found: list[Path] = []
    for split in SPLITS:
        several = sorted(root.glob(f"*{split}.json*"))
        if len(several) > 1:
            names = ", ".join(file.name for file in several)
            raise AnnotationError(f"{root} holds several files of the split {split} ({names}); choose by files=PATTERN")
        found += several
    return found or sorted(root.glob("*pope*.json*"))[:1]


def _from_scenes(folder: CocoFolder, seed: int) -> Source:
    if not folder.is_scenes:
        raise UsageError(f"{folder.root} was not made by vislm data scenes; use source=coco")
    objects = {folder.images[i]: shown for i, shown in folder.objects.items()}
    themes = {folder.images[i]: theme for i, theme in folder.themes.items()}
    return Source(scene_questions(objects, seed), _paths(folder), f"scenes, seed {seed}", objects, themes)


def _from_coco(folder: CocoFolder, draw: int | None, seed: int, faults: Sequence[str]) -> Source:
    """Build all splits; questions are in the order of the images, so that the first N samples hold every split."""
    objects = {folder.images[i]: shown for i, shown in folder.objects.items()}
    enough = {name: shown for name, shown in objects.items() if len(shown) >= PER_IMAGE}
    if not enough and not faults:
        raise AnnotationError(
            f"{folder.root}: no image shows {PER_IMAGE} different objects, which POPE's questions need"
        )
    how = f"official algorithm, seed {seed}"
    if draw is not None:
        enough, how = draw_images(enough, draw, random.Random(seed)), f"{how}, {draw} images drawn"
    questions = [q for split in SPLITS for q in build(enough, split, random.Random(seed))]
    place = {name: number for number, name in enumerate(enough)}
    return Source(sorted(questions, key=lambda q: place[q.image]), _paths(folder), how)


def _paths(folder: CocoFolder) -> dict[str, Path]:
    return {name: folder.path(i) for i, name in folder.images.items()}
