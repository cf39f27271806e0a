"""How VQA-like benchmarks compare short answers: EvalAI's normalisation and the agreement of ten people.

Source: the VQA challenge's answer processing (Goyal et al., "Making the V in VQA Matter", CVPR 2017, arXiv 1612.00837;
github.com/GT-Vision-Lab/VQA) in the form that EvalAI, MMF's TextVQA scorer and LLaVA use. Its slips are kept, because
every published number contains them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", "!")
NUMBERS = {
    word: str(digit) for digit, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = ("a", "an", "the")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the official code passes a flag where the number of replacements belongs


@cache
def contractions() -> dict[str, str]:
    """Return the official table: a word without its apostrophe -> with it. Its capitalised keys never apply."""
    return json.loads((Path(__file__).parent.parent / "data" / "vqa_contractions.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=100_000)  # people's answers repeat
def normalise(answer: str) -> str:
    """Return an answer as EvalAI compares it.

    Lower case; no articles; number words up to ten as digits; contractions with their apostrophe; a punctuation mark
    goes without trace if it stands beside a space anywhere in the answer, and becomes a space otherwise; periods stay
    only before digits.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    before = text
    for mark in PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in before or f" {mark}" in before else " ")
    words = _PERIOD.sub("", text, count=_MOST_PERIODS).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(contractions().get(word, word) for word in words if word not in ARTICLES)


def consensus(answers: Sequence[str]) -> dict[str, float]:
    """Return normalised answer -> score, for every different answer that people gave.

    Of n people's answers each is left out once; an answer that at least three of the others gave is fully right,
    one given by two of them 2/3, by one 1/3; the score is the mean over the n choices of whom to leave out.
    """
    counts = Counter(normalise(answer) for answer in answers)
    n = len(answers)
    return {
        answer: (count * min(1.0, (count - 1) / 3) + (n - count) * min(1.0, count / 3)) / n
        for answer, count in counts.items()
    }


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Return how far people agree with a prediction, 0 to 1."""
    return consensus(answers).get(normalise(prediction), 0.0)
