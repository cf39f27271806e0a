"""Building POPE's questions from what images show, by the official algorithm.

Source: Li et al., EMNLP 2023, arXiv 2305.10355; github.com/RUCAIBox/POPE. Fed with CHAIR's objects of the 500 official
images it gives the official popular split, question for question.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from vislm.errors import UnknownName, UsageError
from vislm.eval.questions.pope_questions import SPLITS, TEMPLATE, Label, Question

PER_IMAGE = 3
"""Pairs of questions per image."""


def draw_images(
    objects: Mapping[str, Sequence[str]], number: int, rng: random.Random, *, per_image: int = PER_IMAGE
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
    per_image: int = PER_IMAGE,
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
