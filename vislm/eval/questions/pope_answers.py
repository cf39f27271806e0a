"""From POPE answers to yes or no, and to metrics. Needs no model and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vislm.errors import UnknownName
from vislm.eval.questions.yes_no import auroc as auroc
from vislm.eval.questions.yes_no import ranking, ranking_warnings

PARSERS = ("official", "lmms-eval", "pai", "vlmevalkit")


def parse(text: str, rule: str = "official") -> str:
    """Return "yes", "no", or what the rule makes of other answers.

    "wrong" is a wrong answer that is neither (lmms-eval), "unknown" a wrong answer that is not yes and hence a miss
    where yes was right (VLMEvalKit without a judge), "dropped" does not count at all (PAI).

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
        return "unknown"
    raise UnknownName("POPE parser", rule, PARSERS)


def metrics(
    labels: Sequence[str], predictions: Sequence[str], margins: Sequence[float | None] | None = None
) -> dict[str, Any]:
    """Return accuracy, its standard error, precision, recall, f1, yes_ratio, counts, and AUROC of the margins if given.

    The positive class is "yes"; a ratio without denominator is 0.0 and named under "warnings". The AUROC is over the
    answers that the accuracy counts; answers without a margin are left out of it, counted as "n_without_margin" and
    named under "warnings".
    """
    rows = [(a, p) for a, p in zip(labels, predictions, strict=True) if p != "dropped"]
    tp = sum(a == "yes" and p == "yes" for a, p in rows)
    fp = sum(a == "no" and p == "yes" for a, p in rows)
    tn = sum(a == "no" and p == "no" for a, p in rows)
    fn = sum(a == "yes" and p in ("no", "unknown") for a, p in rows)
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
        "n_unparsed": sum(p not in ("yes", "no") for p in predictions),
    }
    if margins is not None:
        counted = [(a == "yes", m) for a, p, m in zip(labels, predictions, margins, strict=True) if p != "dropped"]
        positive, known = [a for a, _ in counted], [m for _, m in counted]
        result |= ranking(positive, known)
        warnings += ranking_warnings(positive, known)
    if warnings:
        result["warnings"] = warnings
    return result
