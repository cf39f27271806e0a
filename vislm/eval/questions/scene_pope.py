"""POPE questions about generated scenes, and oracles that never see the picture.

A model that an oracle explains has learnt which objects go together, not to look.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vislm.data.scene_categories import CATEGORIES, THEMES, UNIVERSALS
from vislm.eval.questions.pope_questions import SPLITS, TEMPLATE, Question
from vislm.eval.questions.yes_no import auroc

STATISTICS = Path(__file__).parent.parent / "data" / "scene_co_occurrence.json"
"""Co-occurrence counts of 4,000 biased scenes of seed 5, rows and columns in the order of ``CATEGORIES``."""
OFF_THEME = 0.01


def scene_questions(objects: Mapping[str, Sequence[str]], seed: int = 0) -> list[Question]:
    """Build all three splits: per scene k = min(3, present) present and k absent categories.

    The present ones are the same in every split. random: uniform; popular: most frequent over 4,000 other scenes;
    adversarial: highest sum of co-occurrences with all present ones over those scenes.
    """
    frequency, together = _statistics()
    questions: list[Question] = []
    for image, shown in objects.items():
        rng = random.Random(f"{seed}/{image}")
        present = [c for c in CATEGORIES if c in shown]
        absent = [c for c in CATEGORIES if c not in shown]
        k = min(3, len(present), len(absent))
        negatives = {
            "random": rng.sample(absent, k),
            "popular": sorted(absent, key=lambda c: -frequency[c])[:k],
            "adversarial": sorted(absent, key=lambda c: -sum(together[c, p] for p in present))[:k],
        }
        positives = rng.sample(present, k)
        for split in SPLITS:
            for name in [*positives, *negatives[split]]:
                label = "yes" if name in positives else "no"
                questions.append(Question(f"{split}/{image}/{name}", split, image, TEMPLATE.format(name), label))
    return questions


@cache
def _statistics() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Return how many scenes show a category, and how many show two; counted once, as drawing the scenes takes time."""
    counts = json.loads(STATISTICS.read_text(encoding="utf-8"))["counts"]
    frequency = {c: counts[i][i] for i, c in enumerate(CATEGORIES)}
    pairs = {(a, b): counts[i][j] for i, a in enumerate(CATEGORIES) for j, b in enumerate(CATEGORIES)}
    return frequency, pairs


def probability(category: str, theme: str) -> float:
    """Return how likely a category is in a scene of a theme, as the oracles model it."""
    return THEMES[theme][1].get(category, UNIVERSALS.get(category, OFF_THEME))


def context_oracle(category: str, others: Sequence[str]) -> float:
    """Return P(category present | exactly ``others`` of the remaining categories are present), by Bayes over themes."""
    shown, total, present = set(others), 0.0, 0.0
    for theme, (prior, _) in THEMES.items():
        weight = prior
        for name, p in _probabilities(theme).items():
            if name != category:
                weight *= p if name in shown else 1.0 - p
        total += weight
        present += weight * probability(category, theme)
    return present / total


@cache
def _probabilities(theme: str) -> dict[str, float]:
    return {name: probability(name, theme) for name in CATEGORIES}


def oracle_table(
    questions: Sequence[Question], objects: Mapping[str, Sequence[str]], themes: Mapping[str, str | None]
) -> dict[str, dict[str, Any]]:
    """Return split -> oracle -> AUROC, accuracy at its best threshold (fitted on these questions) and at 1/2."""
    context: dict[tuple[str, str], float] = {}  # splits share questions
    table: dict[str, dict[str, Any]] = {}
    for split in dict.fromkeys(q.split for q in questions):
        asked = [(q, q.id.rsplit("/", 1)[1]) for q in questions if q.split == split]
        for q, c in asked:
            if (q.image, c) not in context:
                context[q.image, c] = context_oracle(c, [o for o in objects[q.image] if o != c])
        positive = [q.label == "yes" for q, _ in asked]
        table[split] = {"context_only": _accuracies(positive, [context[q.image, c] for q, c in asked])}
        if all(themes.get(q.image) for q, _ in asked):
            theme = [probability(c, str(themes[q.image])) for q, c in asked]
            table[split]["true_theme"] = _accuracies(positive, theme)
    return table


def _accuracies(positive: Sequence[bool], scores: Sequence[float]) -> dict[str, float]:
    n = max(1, len(scores))
    right = best = sum(positive)  # at the lowest threshold all are called present
    ranked = sorted(zip(scores, positive, strict=True))
    for place, (score, present) in enumerate(ranked, start=1):
        right += -1 if present else 1
        if place == len(ranked) or ranked[place][0] != score:
            best = max(best, right)
    at_half = sum((s > 0.5) == p for s, p in zip(scores, positive, strict=True))
    return {"auroc": auroc(positive, scores), "best_accuracy": best / n, "accuracy_at_half": at_half / n}
