"""Yes/no questions beyond right and wrong: how well the logits of the two words rank the questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vislm.eval.protocol import Row

MISSING = "n_without_margin"


def margin(row: Row) -> float | None:
    """Return how much likelier yes is than no, in logits; None where a row lacks them."""
    logits = row.get("candidates") or {}
    return logits["yes"] - logits["no"] if "yes" in logits and "no" in logits else None


def ranking(positive: Sequence[bool], margins: Sequence[float | None]) -> dict[str, Any]:
    """Return "auroc" over the answers with a margin and, where others have none, their number as "n_without_margin".

    Args:
        positive: whether yes is right, for every answer that the accuracy beside it counts.
        margins: of the same answers.

    Returns:
        Nothing at all if no answer has a margin.
    """
    known = [(p, m) for p, m in zip(positive, margins, strict=True) if m is not None]
    if not known:
        return {}
    found: dict[str, Any] = {"auroc": auroc([p for p, _ in known], [m for _, m in known])}
    return found | ({MISSING: len(margins) - len(known)} if len(known) < len(margins) else {})


def ranking_warnings(positive: Sequence[bool], margins: Sequence[float | None]) -> list[str]:
    """Return what has to be said beside :func:`ranking` of the same answers."""
    known = [p for p, m in zip(positive, margins, strict=True) if m is not None]
    if not known:
        return []
    warnings = []
    if len(known) < len(margins):
        warnings.append(f"auroc is over {len(known)} of {len(margins)} answers, those with the logits of yes and no")
    if len(set(known)) == 1:
        warnings.append("auroc is 0.5 because all its questions have the same right answer")
    return warnings


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
