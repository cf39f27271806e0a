"""BLEU, ROUGE-L and CIDEr-D of captions, equal to the official COCO scorer's.

Source: Papineni et al. (BLEU), ACL 2002; Lin (ROUGE), 2004; Vedantam et al., "CIDEr", CVPR 2015, arXiv 1411.5726; Chen
et al., "Microsoft COCO Captions", arXiv 1504.00325; github.com/tylin/coco-caption, PyPI pycocoevalcap 1.2.

All functions take tokenised captions: for each picture one hypothesis and one or more references, as lists of words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]
ORDERS = 4
_TINY, _SMALL = 1e-15, 1e-9  # of the official scorer; they decide what a picture without a common n-gram gets
_BETA = 1.2
_SIGMA = 6.0


def _grams(words: Words, n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def bleu(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[list[float], list[list[float]]]:
    """Return corpus BLEU-1 to BLEU-4, and for each picture the same formula on that picture alone.

    Clipped counts are added up over pictures; the reference length is the one closest to the hypothesis, the shorter
    of two such; the mean over orders is geometric.
    """
    totals, each = _BleuCounts(), []
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        counts = _BleuCounts.of(hypothesis, texts)
        totals.add(counts)
        each.append(counts.scores())
    return totals.scores(), each


class _BleuCounts:
    def __init__(self) -> None:
        self.correct, self.guessed = [0] * ORDERS, [0] * ORDERS
        self.length = self.wanted = 0

    @classmethod
    def of(cls, hypothesis: Words, references: Sequence[Words]) -> _BleuCounts:
        counts = cls()
        counts.length = len(hypothesis)
        counts.wanted = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
        for n in range(1, ORDERS + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in references:
                most |= _grams(reference, n)
            counts.correct[n - 1] = sum((_grams(hypothesis, n) & most).values())
            counts.guessed[n - 1] = max(0, len(hypothesis) - n + 1)
        return counts

    def add(self, other: _BleuCounts) -> None:
        self.correct = [a + b for a, b in zip(self.correct, other.correct, strict=True)]
        self.guessed = [a + b for a, b in zip(self.guessed, other.guessed, strict=True)]
        self.length += other.length
        self.wanted += other.wanted

    def scores(self) -> list[float]:
        ratio = (self.length + _TINY) / (self.wanted + _SMALL)
        penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        product, scores = 1.0, []
        for n, (correct, guessed) in enumerate(zip(self.correct, self.guessed, strict=True), start=1):
            product *= (correct + _TINY) / (guessed + _SMALL)
            scores.append(product ** (1 / n) * penalty)
        return scores


def rouge_l(hypothesis: Words, references: Sequence[Words]) -> float:
    """Return ROUGE-L of one picture; the best precision and the best recall may come from different references."""
    if not hypothesis:
        return 0.0
    common = [_longest_common(hypothesis, reference) for reference in references]
    precision = max(c / len(hypothesis) for c in common)
    recall = max(c / len(r) if r else 0.0 for c, r in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(a: Words, b: Words) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        above = 0
        for j, other in enumerate(b, start=1):
            above, row[j] = row[j], above + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


class Cider:
    """CIDEr-D; how rare an n-gram is depends on the references of all pictures that are scored together."""

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        self._frequency: Counter[tuple[str, ...]] = Counter()
        for texts in references:
            self._frequency.update({gram for text in texts for n in range(1, ORDERS + 1) for gram in _grams(text, n)})
        self._pictures = math.log(len(references)) if references else 0.0

    def score(self, hypothesis: Words, references: Sequence[Words]) -> float:
        """Return CIDEr-D of one picture, 0 to 10; always 0 where only one picture is scored."""
        ours = self._vectors(hypothesis)
        total = 0.0
        for text in references:
            gap = max(0, len(hypothesis) - 1) - max(0, len(text) - 1)  # the official length counts pairs of words
            nearness = math.exp(-(gap**2) / (2 * _SIGMA**2))
            pairs = zip(ours, self._vectors(text), strict=True)
            total += nearness * sum(_similarity(a, b) for a, b in pairs) / ORDERS
        return 10 * total / len(references)

    def _vectors(self, words: Words) -> list[dict[tuple[str, ...], float]]:
        return [
            {
                gram: count * (self._pictures - math.log(max(1, self._frequency[gram])))
                for gram, count in _grams(words, n).items()
            }
            for n in range(1, ORDERS + 1)
        ]


def _similarity(ours: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
    norms = math.sqrt(sum(v * v for v in ours.values())) * math.sqrt(sum(v * v for v in theirs.values()))
    product = sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours.items() if gram in theirs)
    return product / norms if norms else product


def cider(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float, list[float]]:
    """Return the mean CIDEr-D and each picture's."""
    scorer = Cider(references)
    each = [scorer.score(h, r) for h, r in zip(hypotheses, references, strict=True)]
    return sum(each) / max(1, len(each)), each


def caption_scores(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    """Return Bleu_1 to Bleu_4, ROUGE_L and CIDEr over all pictures."""
    rouge = [rouge_l(h, r) for h, r in zip(hypotheses, references, strict=True)]
    scores = {f"Bleu_{n}": value for n, value in enumerate(bleu(hypotheses, references)[0], start=1)} if rouge else {}
    return {
        **(scores or {f"Bleu_{n}": 0.0 for n in range(1, ORDERS + 1)}),
        "ROUGE_L": sum(rouge) / max(1, len(rouge)),
        "CIDEr": cider(hypotheses, references)[0],
    }
