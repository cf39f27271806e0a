"""CHAIR's scores: which objects does a caption mention, and which of them are not in the image?

Source: Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156;
github.com/LisaAnne/Hallucination, and the port Maxlinn/CHAIR-metric-standalone (adds Recall). Scoring needs no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError
from vislm.eval.captions.singularize import singularize
from vislm.eval.captions.tokenize import tokenize
from vislm.eval.captions.vocabulary import Vocabulary
from vislm.eval.reading import read_json, shown

_IMAGE_ID = re.compile(r"[0-9]{1,18}")
_LISTED = 5
"""Faults that a message names."""


@dataclass(frozen=True)
class Mentions:
    """The objects of one caption."""

    tokens: list[str]
    """Singular words and punctuation, two-word phrases joined."""
    words: list[str]
    """The object words as written."""
    nodes: list[str]
    """The objects that they name; repeats count."""
    indices: list[int]
    """Places of the words among the tokens before phrases were joined. If a toilet seat was removed, the official code
    reads the places of the shortened list, and so does this."""


def mentions(caption: str, vocabulary: Vocabulary) -> Mentions:
    """Return the objects that a caption mentions, by the official rules."""
    words = [singularize(token) for token in tokenize(caption.lower())]
    tokens, starts, i = [], [], 0
    while i < len(words):
        starts.append(i)
        pair = " ".join(words[i : i + 2])
        if pair in vocabulary.phrases:
            tokens.append(vocabulary.phrases[pair])
            i += 2
        else:
            tokens.append(words[i])
            i += 1
    without_seats = [t for t in tokens if t != "seat"] if "toilet" in tokens else tokens
    found = [(n, t) for n, t in enumerate(without_seats) if t in vocabulary.node_of]
    return Mentions(
        tokens, [t for _, t in found], [vocabulary.node_of[t] for _, t in found], [starts[n] for n, _ in found]
    )


@dataclass(frozen=True)
class CaptionScore:
    """One caption against the objects of its image."""

    mentions: Mentions
    hallucinated: list[tuple[str, str]]
    """(word, object) of every mention of an absent object."""
    correct: frozenset[str]
    truth: frozenset[str]

    @property
    def chair_s(self) -> int:
        """1 if an absent object is mentioned."""
        return int(bool(self.hallucinated))

    @property
    def chair_i(self) -> float:
        """Hallucinated share of the mentions."""
        return len(self.hallucinated) / len(self.mentions.nodes) if self.mentions.nodes else 0.0

    @property
    def recall(self) -> float:
        """Share of the image's objects that are mentioned."""
        return len(self.correct) / len(self.truth) if self.truth else 0.0


def score_caption(caption: str, truth: Collection[str], vocabulary: Vocabulary) -> CaptionScore:
    """Score one caption against the set of objects in its image."""
    found = mentions(caption, vocabulary)
    wrong = [(w, n) for w, n in zip(found.words, found.nodes, strict=True) if n not in truth]
    return CaptionScore(found, wrong, frozenset(n for n in found.nodes if n in truth), frozenset(truth))


def overall(scores: Sequence[CaptionScore]) -> dict[str, Any]:
    """Return CHAIR_s, CHAIR_i, Recall, F1 (fractions), mean length in tokens and mentions, and their counts.

    F1 is that of PAI: each object counts once per caption, so a caption gains nothing by repeating itself.
    """
    mentioned = sum(len(s.mentions.nodes) for s in scores)
    wrong = sum(len(s.hallucinated) for s in scores)
    correct = sum(len(s.correct) for s in scores)
    truth = sum(len(s.truth) for s in scores)
    distinct = sum(len(set(s.mentions.nodes)) for s in scores)
    n = max(1, len(scores))
    result = {
        "CHAIR_s": sum(s.chair_s for s in scores) / n,
        "CHAIR_i": wrong / mentioned if mentioned else 0.0,
        "Recall": correct / truth if truth else 0.0,
        "F1": 2 * correct / (truth + distinct) if truth + distinct else 0.0,
        "Length": sum(len(s.mentions.tokens) for s in scores) / n,
        "Mentions": mentioned / n,
        "n": len(scores),
        "n_mentions": mentioned,
        "n_hallucinated": wrong,
    }
    missing = [f"{k} has no denominator" for k, d in (("CHAIR_i", mentioned), ("Recall", truth)) if not d]
    return {**result, "warnings": missing} if missing else result


def by_object(scores: Sequence[CaptionScore]) -> dict[str, dict[str, Any]]:
    """Return object -> mentions, hallucinated mentions, images that show it, and the share of those that name it."""
    mentioned = Counter(name for s in scores for name in s.mentions.nodes)
    wrong = Counter(name for s in scores for _, name in s.hallucinated)
    shown = Counter(name for s in scores for name in s.truth)
    named = Counter(name for s in scores for name in s.correct)
    return {
        name: {
            "mentions": mentioned[name],
            "hallucinated": wrong[name],
            "images": shown[name],
            "recall": named[name] / shown[name] if shown[name] else 0.0,
        }
        for name in sorted({*mentioned, *shown})
    }


def ground_truth(
    objects: Mapping[int, Sequence[str]], captions: Mapping[int, Sequence[str]], vocabulary: Vocabulary
) -> dict[int, set[str]]:
    """Return image id -> objects, from instance categories and from what people's captions mention."""
    truth = {i: {vocabulary.node_of.get(name, name) for name in names} for i, names in objects.items()}
    for image, texts in captions.items():
        for text in texts:
            truth.setdefault(image, set()).update(mentions(text, vocabulary).nodes)
    return truth


def read_object_table(path: Path, vocabulary: Vocabulary, faults: list[str] | None = None) -> dict[int, set[str]]:
    """Read the compact table {image id: [object numbers]} (.json or .json.gz) of a whole data set.

    Args:
        path: e.g. chair_ground_truth_pattern2014.json.gz.
        vocabulary: the objects by number.
        faults: grows by one line per broken entry, which is left out; None: broken entries are an error.

    Raises:
        AnnotationError: no table, or without ``faults`` entries that are no list of object numbers.
    """
    found: list[str] = []
    table: dict[int, set[str]] = {}
    for key, numbers in read_json(path, dict, unique_keys=True).items():
        known = isinstance(numbers, list) and all(type(n) is int and 0 <= n < len(vocabulary.objects) for n in numbers)
        if not _IMAGE_ID.fullmatch(key):
            found.append(f"{path.name}: key {shown(key)} is no image id")
        elif not known:
            found.append(f"{path.name}: image {key} has {shown(numbers)}; expected a list of object numbers")
        else:
            table[int(key)] = {vocabulary.objects[n] for n in numbers}
    if faults is not None:
        faults += found
    elif found:
        raise AnnotationError(f"{path}: {len(found)} faults: {'; '.join(found[:_LISTED])}")
    return table
