"""Retrieval heads: those that look at what the model copies.

Source: Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", ICLR 2025, arXiv 2404.15574;
github.com/nightdessert/Retrieval_Head. The visual variant is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vislm.errors import UsageError

OVERLAP = 0.9
"""Share of the needle's ids that a span of the prompt has to hold."""
LEAST_RECALL = 0.5
"""Trials with a lower ROUGE-1 recall say nothing about heads."""
CUT = 0.1
"""Usual score of a retrieval head; under 5 % of heads have it."""


def find_needle(prompt: Sequence[int], needle: Sequence[int], overlap: float = OVERLAP) -> tuple[int, int]:
    """Return the first span [a, b) of the prompt's ids, as long as the needle, that holds its ids.

    Tokens at the needle's ends may merge with their surroundings, so that an exact match is not required.

    Raises:
        UsageError: an empty needle, or no such span.
    """
    wanted = set(needle)
    if not wanted:
        raise UsageError("the needle is empty")
    for start in range(len(prompt) - len(needle) + 1):
        if len(wanted & set(prompt[start : start + len(needle)])) > overlap * len(wanted):
            return start, start + len(needle)
    raise UsageError(f"no span of {len(needle)} prompt tokens holds more than {overlap:.0%} of the needle's ids")


def rouge1_recall(answer: str, needle: str) -> float:
    """Return the share of the needle's words, counted with repetitions, that the answer has."""
    wanted, said = Counter(needle.lower().split()), Counter(answer.lower().split())
    total = sum(wanted.values())
    return sum(min(count, said[word]) for word, count in wanted.items()) / total if total else 0.0


def retrieval_scores(
    top_key: Tensor,
    produced: Sequence[int],
    prompt: Sequence[int],
    span: tuple[int, int],
    *,
    repeats: Literal["code_counts_each", "paper_counts_once"] = "code_counts_each",
) -> Tensor:
    """Return the score (L, H) of every head in one trial.

    A head scores 1 / (b - a) whenever its strongest key j lies in the needle's span [a, b) and the token produced there
    is the prompt's j-th.

    Args:
        top_key: (S, L, H) int64: the strongest key of the row that produced token s, for each step.
        produced: the S tokens.
        prompt: ids.
        span: [a, b).
        repeats: whether a token copied twice counts twice, as in the code, or is one element of the paper's set.
    """
    if len(produced) != len(top_key):
        raise UsageError(f"{len(produced)} tokens, but rows of {len(top_key)} steps")
    start, stop = span
    if not 0 <= start < stop <= len(prompt):
        raise UsageError(f"{span=}: expected a part of the {len(prompt)} prompt tokens")
    scores = torch.zeros(top_key.shape[1:])
    seen: set[tuple[int, int, int]] = set()
    for keys, token in zip(top_key, produced, strict=True):
        for layer, head in ((keys >= start) & (keys < stop)).nonzero().tolist():
            if prompt[int(keys[layer, head])] != token:
                continue
            if repeats == "paper_counts_once":
                if (layer, head, token) in seen:
                    continue
                seen.add((layer, head, token))
            scores[layer, head] += 1.0 / (stop - start)
    return scores


def strongest(scores: Tensor, cut: float = CUT) -> list[tuple[int, int, float]]:
    """Return (layer, head, score) of all heads with scores (L, H) of at least ``cut``, best first."""
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    heads = [(*divmod(place, scores.shape[1]), float(scores.flatten()[place])) for place in order]
    return [entry for entry in heads if entry[2] >= cut]


def box_tokens(
    box: tuple[float, float, float, float], grid: tuple[int, int], start: int = 0, row_stride: int | None = None
) -> list[int]:
    """Return the image tokens whose cell's centre lies in a box (left, top, right, bottom), fractions of the picture.

    Args:
        box: from 0 to 1.
        grid: tokens (rows, columns).
        start: index of the grid's first token.
        row_stride: tokens from one row to the next; None: as many as columns.

    Raises:
        UsageError: a box outside the picture, or one without any centre.
    """
    left, top, right, bottom = box
    if not (0.0 <= left < right <= 1.0 and 0.0 <= top < bottom <= 1.0):
        raise UsageError(f"{box=}: expected left < right, top < bottom, from 0 to 1")
    rows, columns = grid
    inside = [
        start + row * (columns if row_stride is None else row_stride) + column
        for row in range(rows)
        for column in range(columns)
        if left <= (column + 0.5) / columns < right and top <= (row + 0.5) / rows < bottom
    ]
    if not inside:
        raise UsageError(f"{box=} holds the centre of no cell of the {rows} x {columns} grid; make it larger")
    return inside
