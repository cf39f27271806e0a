"""How sure a score is, and whether two runs on the same samples differ.

Samples that share a picture are not independent: every resampling draws whole groups (pictures) with replacement, and
standard errors are those of group sums. Sources: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993;
McNemar, Psychometrika 12, 1947.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from vislm.errors import UsageError

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], float]
"""From per-sample values (n, ...) to a score."""


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Difference:
    """Score of run A minus score of run B on the same samples."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided, from the bootstrap: twice the share of resamples on the other side of zero."""
    wins: int
    """Samples on which A alone is right (McNemar's b)."""
    losses: int
    """Samples on which B alone is right (McNemar's c)."""
    mcnemar: float
    """Exact two-sided p of McNemar's test; meaningful where values are right or wrong."""


def standard_error(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> float:
    """Return the standard error of the mean of values (n,), clustered by ``groups`` (n,)."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return float("nan")
    member = _numbers(groups, len(x))
    sums = np.bincount(member, weights=x - x.mean())
    g = len(sums)
    return float(np.sqrt((sums**2).sum() * g / max(g - 1, 1)) / len(x))


def interval(
    values: Sequence[float] | Floats,
    groups: Sequence[Hashable] | None = None,
    statistic: Statistic | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return a statistic (the mean by default) of per-sample values (n,) or (n, k), with a bootstrap interval.

    Args:
        values: one row per sample.
        groups: what each sample belongs to, e.g. its picture; None: samples are independent.
        statistic: from rows to a score.
        resamples: draws.
        seed: of the draws.
    """
    x, score = np.asarray(values, dtype=np.float64), statistic or _mean
    draws = _resampled(score, x, _draws(_numbers(groups, len(x)), resamples, seed))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(score(x)), float(low), float(high))


def difference(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    groups: Sequence[Hashable] | None = None,
    statistic: Statistic | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Return how run A differs from run B on the same samples: paired bootstrap and McNemar's test.

    Args:
        a: per-sample values (n,) or (n, k) of run A; 1 or 0 where answers are right or wrong.
        b: those of run B, the same samples in the same order.
        groups: what each sample belongs to.
        statistic: from rows to a score; the mean by default.
        resamples: draws.
        seed: of the draws.

    Raises:
        UsageError: the runs have different numbers of samples.
    """
    x, y, score = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64), statistic or _mean
    if x.shape != y.shape or not len(x):
        raise UsageError(f"runs of {len(x)} and {len(y)} samples cannot be paired; compare the same samples")
    indices = _draws(_numbers(groups, len(x)), resamples, seed)
    draws = _resampled(score, x, indices) - _resampled(score, y, indices)
    low, high = np.percentile(draws, [2.5, 97.5])
    tail = min((draws <= 0).mean(), (draws >= 0).mean())
    first, second = (z if z.ndim == 1 else z[:, 0] for z in (x, y))
    wins, losses = int((first > second).sum()), int((first < second).sum())
    return Difference(
        float(score(x) - score(y)),
        float(low),
        float(high),
        float(min(1.0, 2 * tail)),
        wins,
        losses,
        mcnemar(wins, losses),
    )


def mcnemar(wins: int, losses: int) -> float:
    """Return the exact two-sided p that so uneven discordant pairs arise when neither run is better."""
    n, k = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    tail = sum(comb(n, i) for i in range(k + 1))
    return min(1.0, float(2 * tail / 2**n) if n < 1000 else float((2 * tail * 10**15 // 2**n) / 10**15))


def _resampled(score: Statistic, x: Floats, indices: Sequence[NDArray[np.int64]]) -> Floats:
    """Return a statistic of every resample; one that has ``weighted`` is asked with counts, which spares it sorting."""
    weighted = getattr(score, "weighted", None)
    if weighted is None:
        return np.asarray([score(x[index]) for index in indices])
    of_counts = weighted(x)
    return np.asarray([of_counts(np.bincount(index, minlength=len(x)).astype(np.float64)) for index in indices])


def _mean(x: Floats) -> float:
    return float(x.mean())


def _numbers(groups: Sequence[Hashable] | None, count: int) -> NDArray[np.int64]:
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise UsageError(f"{len(groups)} groups for {count} samples")
    known: dict[Hashable, int] = {}
    return np.asarray([known.setdefault(g, len(known)) for g in groups])


def _draws(member: NDArray[np.int64], resamples: int, seed: int) -> list[NDArray[np.int64]]:
    """Return for every resample the indices of its samples."""
    order = np.argsort(member, kind="stable")
    bounds = np.concatenate([[0], np.bincount(member).cumsum()])
    generator = np.random.default_rng(seed)
    count = len(bounds) - 1
    if count == len(member):
        return [order[generator.integers(0, count, count)] for _ in range(resamples)]
    draws = []
    for _ in range(resamples):
        chosen = generator.integers(0, count, count)
        draws.append(np.concatenate([order[bounds[g] : bounds[g + 1]] for g in chosen]))
    return draws
