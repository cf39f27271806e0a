"""CHAIR: which objects does a caption mention, and which of them are not in the image?

Source: Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156;
github.com/LisaAnne/Hallucination, and the port Maxlinn/CHAIR-metric-standalone (adds Recall). Scoring needs no torch.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError
from vislm.eval.singularize import singularize
from vislm.eval.tokenize import tokenize
from vislm.eval.vocabulary import Vocabulary


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
    """Return CHAIR_s, CHAIR_i, Recall (fractions), mean length in tokens and mentions, and their counts."""
    mentioned = sum(len(s.mentions.nodes) for s in scores)
    wrong = sum(len(s.hallucinated) for s in scores)
    truth = sum(len(s.truth) for s in scores)
    n = max(1, len(scores))
    result = {
        "CHAIR_s": sum(s.chair_s for s in scores) / n,
        "CHAIR_i": wrong / mentioned if mentioned else 0.0,
        "Recall": sum(len(s.correct) for s in scores) / truth if truth else 0.0,
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


def read_object_table(path: Path, vocabulary: Vocabulary) -> dict[int, set[str]]:
    """Read the compact table {image id: [object numbers]} (.json or .json.gz) of a whole data set."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        table = {int(i): list(numbers) for i, numbers in json.loads(raw).items()}
        unknown = [n for numbers in table.values() for n in numbers if type(n) is not int or n < 0]
        if unknown:
            raise ValueError(f"object number {unknown[0]!r}")
        return {i: {vocabulary.objects[n] for n in numbers} for i, numbers in table.items()}
    except (OSError, EOFError, zlib.error, ValueError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise AnnotationError(f"{path} is not an object table: {error}") from error
