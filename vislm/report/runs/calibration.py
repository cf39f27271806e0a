"""Is a model that says yes with probability 0.8 right in 80 % of the cases? From the margins of yes-no answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Samples whose probability of yes lies in [low, high)."""

    low: float
    high: float
    n: int
    predicted: float
    """Mean probability of yes, out of yes and no."""
    observed: float
    """Share of samples where yes is right."""


def bins(rows: Mapping[str, Mapping[str, Any]]) -> list[Bin]:
    """Return the bins that are not empty; none where rows have no "margin" (logit of yes minus that of no) and "label".

    The probability is the softmax over the two words, 1 / (1 + exp(-margin)), at temperature 1.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for row in rows.values():
        values = row.get("values") or {}
        if "margin" not in values or "label" not in values:
            continue
        chance = _sigmoid(float(values["margin"]))
        found.setdefault(min(int(chance * _BINS), _BINS - 1), []).append((chance, float(values["label"])))
    return [
        Bin(k / _BINS, (k + 1) / _BINS, len(pairs), _mean([p for p, _ in pairs]), _mean([y for _, y in pairs]))
        for k, pairs in sorted(found.items())
    ]


def expected_error(found: Sequence[Bin]) -> float:
    """Return the expected calibration error: |predicted - observed|, weighted by the bins' sizes."""
    total = sum(b.n for b in found)
    return sum(b.n * abs(b.predicted - b.observed) for b in found) / total if total else 0.0


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
