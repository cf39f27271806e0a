"""POPE's questions, and reading them from the files in circulation.

Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, arXiv 2305.10355;
github.com/RUCAIBox/POPE. ``pope_build`` makes questions from annotations, ``pope_answers`` scores the answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vislm.errors import AnnotationError
from vislm.eval.coco import is_safe_name
from vislm.eval.reading import read_text

SPLITS = ("random", "popular", "adversarial")
TEMPLATE = "Is there a {} in the image?"
Label = Literal["yes", "no"]
_LISTED = 5
"""Faults that a message names."""


@dataclass(frozen=True)
class Question:
    """One question of one split."""

    id: str
    split: str
    image: str
    text: str
    label: Label


def read_questions(path: Path, split: str | None = None, faults: list[str] | None = None) -> list[Question]:
    """Read a POPE question file: JSON lines (whatever its suffix), a JSON list, or one line of lists per image.

    Args:
        path: the current files, the older random file of 2,910 lines, RePOPE, LLaVA's file of all splits, ...; .gz too.
        split: name of the split; None: each entry's "category" key, else the split that the file's name ends in.
        faults: grows by one line per broken entry, which is left out; None: broken entries are an error.

    Raises:
        AnnotationError: a file that cannot be read; and without ``faults``: broken JSON, missing keys, labels other
            than yes and no, image names that leave the image folder, or a repeated question_id; the first faults are
            listed by line.
    """
    found: list[str] = []
    questions: dict[str, Question] = {}
    for place, row in _entries(path, found):
        try:
            for question in _parsed(row, split or _split_of(row, path), place):
                if question.id in questions:
                    raise ValueError(f"question_id {question.id.split('/')[1]} is not unique")
                questions[question.id] = question
        except KeyError as error:
            found.append(f"entry {place} has no {error}")
        except (TypeError, ValueError) as error:
            found.append(f"entry {place}: {error}")
    if faults is not None:
        faults += [f"{path.name}: {fault}" for fault in found]
    elif found:
        raise AnnotationError(f"{path}: {len(found)} faults: {'; '.join(found[:_LISTED])}")
    return list(questions.values())


def _entries(path: Path, faults: list[str]) -> Iterator[tuple[int, Any]]:
    """Yield the entries of the file with their line, or place in the list; broken lines go to ``faults``."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except (ValueError, RecursionError) as error:
            raise AnnotationError(f"cannot read the POPE questions {path}: {error}") from error
        return
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
    name = path.name.partition(".")[0]
    return category if category in SPLITS else next((s for s in SPLITS if name.endswith(s)), name)


def object_of(text: str) -> str | None:
    """Return the object that a question in the official words asks about; None for other questions."""
    found = re.search(r"is there an? (.+?) in the iman?ge ?\?", text, re.IGNORECASE)
    return found[1] if found else None
