"""POPE: yes/no questions about objects that are there and objects that are not.

Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, arXiv 2305.10355;
github.com/RUCAIBox/POPE. Scoring and building need no torch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vislm.errors import AnnotationError, UnknownName, UsageError

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


# -- reading and building ------------------------------------------------------------------------------------------------
def read_questions(path: Path, split: str) -> list[Question]:
    """Read a POPE question file: JSON lines (whatever its suffix), a JSON list, or one line of lists per image.

    Raises:
        AnnotationError: broken JSON, missing keys, labels other than yes and no; the first faults are listed by line.
    """
    text = path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(s) for s in text.splitlines() if s.strip()]
    except ValueError as error:
        raise AnnotationError(f"{path} is not JSON lines: {error}") from error
    questions: list[Question] = []
    faults: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            pairs = _expanded(row)
            image = row["image"]
            if not isinstance(image, str):
                raise TypeError("image")
            for text, label in pairs:
                if label not in ("yes", "no") or not isinstance(text, str):
                    raise ValueError(f"label {label!r}")
                key = row.get("question_id", number) if len(pairs) == 1 else f"{number}.{len(questions)}"
                questions.append(Question(f"{split}/{key}", split, image, text, label))
        except (KeyError, TypeError, ValueError) as error:
            faults.append(f"entry {number}: {error!r}")
    if faults:
        raise AnnotationError(f"{path}: {len(faults)} faults: {'; '.join(faults[:5])}")
    if len({q.id for q in questions}) != len(questions):
        raise AnnotationError(f"{path}: question_id is not unique")
    return questions


def _expanded(row: Any) -> list[tuple[Any, Any]]:
    text, label = row["text"], row["label"]
    return list(zip(text, label, strict=True)) if isinstance(text, list) else [(text, label)]


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


def _question(name: str, template: str, legacy_article: bool) -> str:
    if name[:1] not in "aeiou" or not name:
        return template.format(name)
    if legacy_article:
        return template.replace("a", "an").format(name)
    return template.replace(" a {}", " an {}").format(name)


# -- parsing -------------------------------------------------------------------------------------------------------------
PARSERS = ("official", "lmms-eval", "pai", "vlmevalkit")


def parse(text: str, rule: str = "official") -> str:
    """Return "yes", "no", "wrong" (counts as a wrong answer) or "dropped" (does not count), by a named rule.

    "official" is case-sensitive and answers yes unless it finds No, not or no among the words of the first sentence.
    """
    if rule == "official":
        words = text.split(".")[0].replace(",", "").split(" ")
        return "no" if any(w in words for w in ("No", "not", "no")) else "yes"
    if rule == "lmms-eval":
        answer = text.lower().strip()
        return answer if answer in ("yes", "no") else "wrong"
    words = text.replace(".", " ").replace(",", " ").split()
    if rule == "pai":
        if any(w in ("No", "not", "no", "NO") or w.endswith("n't") for w in words):
            return "no"
        return "yes" if any(w in ("Yes", "yes", "YES") for w in words) else "dropped"
    if rule == "vlmevalkit":
        lower = {"".join(c for c in w.lower() if c.isalnum()) for w in text.split()}
        if ("yes" in lower) != ("no" in lower):
            return "yes" if "yes" in lower else "no"
        return "wrong"
    raise UnknownName("POPE parser", rule, PARSERS)


# -- scoring -------------------------------------------------------------------------------------------------------------
def metrics(labels: Sequence[str], predictions: Sequence[str], margins: Sequence[float] | None = None) -> dict[str, Any]:
    """Return accuracy, its standard error, precision, recall, f1, yes_ratio, counts, and AUROC of the margins if given.

    The positive class is "yes"; a ratio without denominator is 0.0 and named under "warnings".
    """
    rows = [(a, p) for a, p in zip(labels, predictions, strict=True) if p != "dropped"]
    tp = sum(a == "yes" and p == "yes" for a, p in rows)
    fp = sum(a == "no" and p == "yes" for a, p in rows)
    tn = sum(a == "no" and p == "no" for a, p in rows)
    fn = sum(a == "yes" and p == "no" for a, p in rows)
    warnings: list[str] = []

    def ratio(name: str, top: float, bottom: float) -> float:
        if bottom == 0:
            warnings.append(f"{name} has no denominator")
            return 0.0
        return top / bottom

    accuracy = ratio("accuracy", tp + tn, len(rows))
    precision, recall = ratio("precision", tp, tp + fp), ratio("recall", tp, tp + fn)
    result: dict[str, Any] = {
        "accuracy": accuracy,
        "accuracy_se": (accuracy * (1 - accuracy) / max(1, len(rows))) ** 0.5,
        "precision": precision,
        "recall": recall,
        "f1": ratio("f1", 2 * precision * recall, precision + recall),
        "yes_ratio": ratio("yes_ratio", sum(p == "yes" for _, p in rows), len(rows)),
        "n": len(rows),
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "n_unparsed": len(labels) - tp - fp - tn - fn,
    }
    if margins is not None:
        result["auroc"] = auroc([a == "yes" for a in labels], margins)
    if warnings:
        result["warnings"] = warnings
    return result


def auroc(positive: Sequence[bool], scores: Sequence[float]) -> float:
    """Return the probability that a positive scores above a negative, ties counting half; 0.5 without both kinds."""
    ranked = sorted(zip(scores, positive, strict=True))
    n_positive = sum(positive)
    n_negative = len(ranked) - n_positive
    if not n_positive or not n_negative:
        return 0.5
    total, start = 0.0, 0
    while start < len(ranked):
        end = start
        while end < len(ranked) and ranked[end][0] == ranked[start][0]:
            end += 1
        total += (start + end + 1) / 2 * sum(p for _, p in ranked[start:end])  # mean rank of a tie
        start = end
    return (total - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
