"""Which words name which object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from vislm.errors import UsageError
from vislm.eval.captions.singularize import singularize


@dataclass(frozen=True)
class Vocabulary:
    """Object names, their synonyms, and two-word phrases that are one word."""

    objects: tuple[str, ...]
    node_of: dict[str, str]
    """Word -> object ("node word")."""
    phrases: dict[str, str] = field(default_factory=dict)
    """"fire hydrant"-like pair of singular words -> the word that it counts as."""


@cache
def coco_vocabulary() -> Vocabulary:
    """Return the 80 COCO objects with CHAIR's synonyms (LisaAnne/Hallucination, BSD 2-Clause)."""
    data = json.loads((Path(__file__).parent.parent / "data" / "chair_vocabulary.json").read_text(encoding="utf-8"))
    node_of = {word: name for name, words in data["synonyms"].items() if name for word in words}
    return Vocabulary(tuple(data["objects"]), node_of, data["double_words"])


def vocabulary_of(names: Sequence[str]) -> Vocabulary:
    """Return a vocabulary of plain category names, found in the singular and with an added s.

    Raises:
        UsageError: a name of three or more words; phrases are joined in pairs.
    """
    node_of, phrases = {name: name for name in names}, {}
    for name in names:
        *first, last = name.split()
        if len(first) > 1:
            raise UsageError(f"category {name!r} has {len(first) + 1} words; captions are searched for one or two")
        for form in (last, f"{last}s"):  # caption words are singularised, with the mistakes of that: "bus" is "bu"
            word = " ".join(singularize(part) for part in (*first, form))
            if first:
                phrases[word] = name
            node_of.setdefault(word, name)
    return Vocabulary(tuple(names), node_of, phrases)
