"""POPE: yes/no questions about objects that are there and objects that are not.

Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, arXiv 2305.10355;
github.com/RUCAIBox/POPE. This file reads and builds questions; ``pope_answers`` scores the answers.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vislm.errors import AnnotationError, UnknownName, UsageError
from vislm.eval.coco import is_safe_name
from vislm.eval.pope_answers import PARSERS, auroc, metrics, parse

__all__ = [
    "PARSERS",
    "SPLITS",
    "TEMPLATE",
    "Question",
    "auroc",
    "build",
    "draw_images",
    "metrics",
    "object_of",
    "parse",
    "read_questions",
    "statistics",
]

SPLITS = ("random", "popular", "adversarial")
TEMPLATE = "Is there a {} in the image?"
Label = Literal["yes", "no"]


@dataclass(frozen=True)
class Question:
    """One question of one split."""

    id: str
    split: str
    image: str
    text: str
    label: Label


def read_questions(path: Path, split: str | None = None) -> list[Question]:
    """Read a POPE question file: JSON lines (whatever its suffix), a JSON list, or one line of lists per image.

    Args:
        path: the current files, the older random file of 2,910 lines, RePOPE, LLaVA's file of all splits, ...
        split: name of the split; None: each entry's "category" key, else the split that the file's name ends in.

    Raises:
        AnnotationError: broken JSON, missing keys, labels other than yes and no, image names that leave the image
            folder, or a repeated question_id; the first faults are listed by line.
    """
    faults: list[str] = []
    questions: dict[str, Question] = {}
    for place, row in _entries(path, faults):
        try:
            for question in _parsed(row, split or _split_of(row, path), place):
                if question.id in questions:
                    raise ValueError(f"question_id {question.id.split('/')[1]} is not unique")
                questions[question.id] = question
        except KeyError as error:
            faults.append(f"entry {place} has no {error}")
        except (TypeError, ValueError) as error:
            faults.append(f"entry {place}: {error}")
    if faults:
        raise AnnotationError(f"{path}: {len(faults)} faults: {'; '.join(faults[:5])}")
    return list(questions.values())


def _entries(path: Path, faults: list[str]) -> Iterator[tuple[int, Any]]:
    """Yield the entries of the file with their line, or place in the list; broken lines go to ``faults``."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), start=1)
            return
    except (OSError, ValueError, RecursionError) as error:
        raise AnnotationError(f"cannot read the POPE questions {path}: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                faults.append(f"line {number} is not JSON ({error})")


def _parsed(row: Any, split: str, place: int) -> Iterator[Question]:
    if not isinstance(row, dict):
        raise TypeError(f"expected an object, got {type(row).__name__}")
    image, texts, labels = row["image"], row["text"], row["label"]
    if not isinstance(image, str) or not is_safe_name(image):
        raise ValueError(f"image {image!r} is not a file name below the image folder")
    together = isinstance(texts, list)  # the "chat" variant: all questions of an image in one entry
    for number, (text, label) in enumerate(zip(texts, labels, strict=True) if together else [(texts, labels)], start=1):
        if not isinstance(text, str) or label not in ("yes", "no"):
            raise ValueError(f"label {label!r} of text {text!r}; expected a text labelled yes or no")
        key = f"{place}.{number}" if together else row.get("question_id", place)
        yield Question(f"{split}/{key}", split, image, text, label)


def _split_of(row: Any, path: Path) -> str:
    category = row.get("category") if isinstance(row, dict) else None
    return category if category in SPLITS else next((s for s in SPLITS if path.stem.endswith(s)), path.stem)


def draw_images(
    objects: Mapping[str, Sequence[str]], number: int, rng: random.Random, *, per_image: int = 3
) -> dict[str, list[str]]:
    """Draw the images to ask about, as the official builder does: among those with enough objects, in random order.

    Raises:
        UsageError: fewer than ``number`` images show ``per_image`` objects.
    """
    enough = {image: list(shown) for image, shown in objects.items() if len(shown) >= per_image}
    if len(enough) < number:
        raise UsageError(f"{len(enough)} images show {per_image} or more objects; {number} were asked for")
    return {image: enough[image] for image in rng.sample(list(enough), number)}


def build(
    objects: Mapping[str, Sequence[str]],
    split: str,
    rng: random.Random,
    *,
    per_image: int = 3,
    template: str = TEMPLATE,
    legacy_article: bool = False,
) -> list[Question]:
    """Build one split by the official algorithm: per image, objects in order, each followed by an absent one.

    Args:
        objects: image -> its objects, without duplicates, in an order that matters.
        split: random: any absent object; popular: the most frequent one; adversarial: the one that co-occurs most
            often with the object asked about before.
        rng: drawn from where the official code draws.
        per_image: pairs of questions per image; images must have at least as many objects.
        legacy_article: replace every "a" of the template by "an" before a vowel, as the official code does ("imange").

    Raises:
        UsageError: an image with too few objects, or one that shows so many that no absent object is left.
    """
    if split not in SPLITS:
        raise UnknownName("POPE split", split, SPLITS)
    counts, together = statistics(objects)
    popular = sorted(counts, key=lambda o: -counts[o])
    near = {o: sorted(others, key=lambda p: -others[p]) for o, others in together.items()}
    vocabulary = list(counts)
    questions: list[Question] = []

    def ask(image: str, name: str, label: Label) -> None:
        number = len(questions) + 1
        text = _question(name, template, legacy_article)
        questions.append(Question(f"{split}/{number}", split, image, text, label))

    for image, shown in objects.items():
        if len(shown) < per_image:
            raise UsageError(f"{image} has {len(shown)} objects; POPE needs {per_image}")
        used: list[str] = []
        for name in shown[:per_image]:
            used.append(name)
            ask(image, name, "yes")
            order = {"random": [], "popular": popular, "adversarial": near[name]}[split]
            absent = next((o for o in order if o not in used and o not in shown), None)
            if absent is None:
                if not set(vocabulary) - set(shown) - set(used):
                    raise UsageError(f"{image} leaves no absent object among the {len(vocabulary)} known ones")
                while (absent := rng.choice(vocabulary)) in used or absent in shown:
                    pass
            used.append(absent)
            ask(image, absent, "no")
    return questions


def statistics(objects: Mapping[str, Sequence[str]]) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Return how many images show each object, and how often two objects share an image, in order of appearance."""
    counts: dict[str, int] = {}
    together: dict[str, dict[str, int]] = {}
    for shown in objects.values():
        for name in shown:
            counts[name] = counts.get(name, 0) + 1
            row = together.setdefault(name, {})
            for other in shown:
                if other != name:
                    row[other] = row.get(other, 0) + 1
    return counts, together


def object_of(text: str) -> str | None:
    """Return the object that a question in the official words asks about; None for other questions."""
    found = re.search(r"is there an? (.+?) in the iman?ge ?\?", text, re.IGNORECASE)
    return found[1] if found else None


def _question(name: str, template: str, legacy_article: bool) -> str:
    if name[:1] not in "aeiou" or not name:
        return template.format(name)
    if legacy_article:
        return template.replace("a", "an").format(name)
    return template.replace(" a {}", " an {}").format(name)
