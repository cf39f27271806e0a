"""AMBER's figures: of yes/no answers exactly as the official script counts them, and of captions.

Source: Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation", arXiv
2311.07397; github.com/junyangwang0410/AMBER.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vislm.eval.questions.yes_no import ranking

SMALL = 0.001
"""What every denominator of the official script starts at."""
ATTRIBUTES = {
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
}
EXISTENCE = "discriminative-hallucination"
CLOSE = 0.8
"""Similarity above which two nouns are taken for one thing."""


def dimension(kind: str) -> str:
    """Return existence, state, number, action or relation for an annotation's type; every unknown type is relation."""
    return "existence" if kind == EXISTENCE else ATTRIBUTES.get(kind, "relation")


@dataclass
class _Counts:
    """What the script adds up for one dimension; a denominator starts at 0.001 for each dimension that it joins."""

    asked: float = SMALL
    correct: int = 0
    truth_no: float = SMALL
    found_no: int = 0
    said_no: float = SMALL
    right_no: int = 0

    def add(self, truth: str, answer: str) -> None:
        self.asked += 1
        self.correct += answer == {"yes": "Yes", "no": "No"}[truth]
        self.truth_no += truth == "no"
        self.found_no += truth == "no" and answer == "No"
        self.said_no += answer == "No"
        self.right_no += truth == "no" and answer == "No"

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(**{key: value + getattr(other, key) for key, value in vars(self).items()})

    def figures(self, small: float = 0.0001) -> dict[str, float]:
        """Return percentages rounded to one decimal; F1 is made of the rounded values, with ``small`` below."""
        accuracy, precision, recall = (
            round(100 * top / bottom, 1)
            for top, bottom in (
                (self.correct, self.asked),
                (self.right_no, self.said_no),
                (self.found_no, self.truth_no),
            )
        )
        p, r = precision / 100, recall / 100
        return {
            "accuracy": accuracy,
            "precision": precision,
            "recall": recall,
            "f1": round(2 * p * r / (p + r + small) * 100, 1),
        }


def discriminative(items: Sequence[tuple[str, str, str]]) -> dict[str, dict[str, float]]:
    """Return the official tables of yes/no answers.

    The positive class is "No": precision is the share of the answers No that are right, recall the share of the
    questions with the truth no that were answered No. Answers other than "Yes" and "No", letter by letter, are wrong.

    Args:
        items: (annotation type, truth "yes" or "no", answer) of each question.

    Returns:
        "all", "existence", "attribute", "state", "number", "action", "relation" -> accuracy, precision, recall, f1 in
        percent with one decimal; dimensions without a question are left out.
    """
    counts = {name: _Counts() for name in ("existence", "state", "number", "action", "relation")}
    every = _Counts()
    for kind, truth, answer in items:
        counts[dimension(kind)].add(truth, answer)
        every.add(truth, answer)
    there = {name for name, count in counts.items() if count.asked >= 1}
    tables = {"all": every.figures()} if items else {}
    if "existence" in there:
        tables["existence"] = counts["existence"].figures(SMALL)
    if there & {"state", "number", "action"}:
        tables["attribute"] = (counts["state"] + counts["number"] + counts["action"]).figures()
    return tables | {
        name: counts[name].figures() for name in ("state", "number", "action", "relation") if name in there
    }


def beside(items: Sequence[tuple[str, str, str, float | None]]) -> dict[str, dict[str, Any]]:
    """Return what the official tables of yes/no answers leave out, in percent, by the same names.

    Args:
        items: (annotation type, truth "yes" or "no", answer, margin of yes over no or None) of each question.

    Returns:
        table -> "yes_ratio", the share of the answers Yes, and where answers have a margin "auroc"; see
        ``yes_no.ranking``.
    """
    tables: dict[str, list[tuple[str, str, float | None]]] = {}
    for kind, truth, answer, margin in items:
        name = dimension(kind)
        for table in ("all", "attribute", name) if name in ATTRIBUTES.values() else ("all", name):
            tables.setdefault(table, []).append((truth, answer, margin))
    found: dict[str, dict[str, Any]] = {}
    for table, asked in tables.items():
        ranked = ranking([truth == "yes" for truth, _, _ in asked], [margin for _, _, margin in asked])
        if "auroc" in ranked:
            ranked["auroc"] = round(100 * ranked["auroc"], 2)
        said_yes = sum(answer == "Yes" for _, answer, _ in asked)
        found[table] = {"yes_ratio": round(100 * said_yes / len(asked), 1), **ranked}
    return found


@dataclass(frozen=True)
class CaptionCount:
    """What one description says."""

    nouns: int
    """Nouns that AMBER's word list knows; repeats count."""
    hallucinated: int
    """Those that stand for nothing in the picture."""
    covered: int
    truth: int
    """Annotated objects, and how many of them are named."""
    imagined: int
    hallu: int
    """Objects that people would expect but that are absent, and how many of them are named."""


def describe(
    nouns: Sequence[str],
    truth: Sequence[str],
    hallu: Sequence[str],
    related: Mapping[str, Sequence[str]],
    safe: Collection[str],
    similarity: Callable[[str, str], float],
) -> CaptionCount:
    """Count one description.

    A noun covers the objects that it names or is associated with. If there is none it is compared with the expected
    absent objects and then with the true ones by similarity. A noun that covers no true object is hallucinated (the
    paper's definition), whether or not it is one of the expected ones.

    Args:
        nouns: of the description, as written there, singular.
        truth: objects in the picture, as annotated (repeats included).
        hallu: absent objects that one would expect.
        related: relation.json, object -> words that may stand for it.
        safe: words that are never counted.
        similarity: of two nouns, 0 to 1.
    """
    known = {*related, *(word for words in related.values() for word in words)}
    counted = [noun for noun in nouns if noun in known]
    covered: set[int] = set()
    imagined: set[int] = set()
    wrong = 0
    for noun in (n for n in counted if n not in safe):
        named = _named(noun, truth, related)
        expected = _named(noun, hallu, related)
        if not named and not expected:
            expected = _first_close(noun, hallu, related, similarity)
            named = _first_close(noun, truth, related, similarity)
        covered |= named
        imagined |= expected - (expected if named else set())
        wrong += not named
    return CaptionCount(len(counted), wrong, len(covered), len(truth), len(imagined), len(hallu))


def _named(noun: str, objects: Sequence[str], related: Mapping[str, Sequence[str]]) -> set[int]:
    return {i for i, name in enumerate(objects) if noun == name or noun in related.get(name, ())}


def _first_close(
    noun: str, objects: Sequence[str], related: Mapping[str, Sequence[str]], similarity: Callable[[str, str], float]
) -> set[int]:
    for i, name in enumerate(objects):
        if any(similarity(noun, word) > CLOSE for word in (name, *related.get(name, ()))):
            return {i}
    return set()


def generative(counts: Sequence[CaptionCount]) -> dict[str, Any]:
    """Return CHAIR, Cover, Hal and Cog in percent with one decimal, as the official script rounds them."""

    def percent(top: int, bottom: int) -> float:
        return round(100 * top / (bottom + SMALL), 1)

    return {
        "CHAIR": percent(sum(c.hallucinated for c in counts), sum(c.nouns for c in counts)),
        "Cover": percent(sum(c.covered for c in counts), sum(c.truth for c in counts)),
        "Hal": percent(sum(c.hallucinated > 0 for c in counts), len(counts)),
        "Cog": percent(sum(c.imagined for c in counts), sum(c.hallu for c in counts)),
    }
