"""POPE with the prompt suffixes and answer parsers that are in use; scores differ by up to six points between them.

Source: Li et al., EMNLP 2023, arXiv 2305.10355. ``pope_answers`` holds the parsers, ``prompts`` the suffixes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.eval import pope
from vislm.eval.benchmarks import Pope, load_benchmark
from vislm.eval.prompts import suffix_text
from vislm.eval.protocol import Control, Sample

_PER_IMAGE = 6


@dataclass(frozen=True)
class PopeVariant(Pope):
    """POPE with a named suffix behind every question."""

    suffix: str = "none"
    faults: Sequence[str] = field(default_factory=list)

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per different pair of image and question; ids are the same for every suffix."""
        end = suffix_text(self.suffix)
        return [dataclasses.replace(sample, prompt=sample.prompt + end) for sample in super().samples]

    @property
    def protocol(self) -> dict[str, Any]:
        """Parser, suffix and origin of the questions."""
        return {**super().protocol, "suffix": self.suffix}


def load(
    path: Path, *, parser: str = "official", suffix: str = "none", seed: int = 0, control: Control = "none"
) -> PopeVariant:
    """Read POPE.

    Args:
        path: folder with ...random.json, ...popular.json, ...adversarial.json (any of them) and images/, or a folder in
            COCO's format, from which questions are built.
        parser: one of ``vislm.eval.pope.PARSERS``: official, lmms-eval, pai (also SPIN's), vlmevalkit.
        suffix: see ``vislm.eval.prompts.SUFFIXES``: none (as in the files), short (LLaVA), yes-no, one-word (VCD).
        seed: of built questions.
        control: grey pictures or not.

    Raises:
        UnknownName: no such parser or suffix.
        AnnotationError: a folder that is incomplete or broken. Questions with both labels become ``faults``.
    """
    pope.parse("", parser)
    suffix_text(suffix)
    plain = load_benchmark("pope", path, control=control, seed=seed)
    assert isinstance(plain, Pope)
    labels: dict[tuple[str, str], set[str]] = {}
    for q in plain.questions:
        labels.setdefault((q.image, q.text), set()).add(q.label)
    both = {key for key, found in labels.items() if len(found) > 1}
    faults = [
        f"{q.id}: {q.text!r} about {q.image} is labelled both yes and no" for q in plain.questions if _key(q) in both
    ]
    values = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    values |= {"questions": [q for q in plain.questions if _key(q) not in both], "rule": parser}
    return PopeVariant(**values, suffix=suffix, faults=faults)


def _key(question: pope.Question) -> tuple[str, str]:
    return question.image, question.text


def suspicions(benchmark: PopeVariant) -> list[str]:
    """Return what is no fault but not as published: missing splits, unequal labels, images without six questions."""
    found = []
    splits = Counter(q.split for q in benchmark.questions)
    if "official files" in benchmark.how:
        found += [f"split {split}: no questions" for split in pope.SPLITS if split not in splits]
        images = Counter((q.split, q.image) for q in benchmark.questions)
        found += [
            f"{split}: {image} has {n} questions; the current files ask {_PER_IMAGE}"
            for (split, image), n in images.items()
            if n != _PER_IMAGE
        ]
    for split, n in splits.items():
        yes = sum(q.label == "yes" for q in benchmark.questions if q.split == split)
        if 2 * yes != n:
            found.append(f"split {split}: {yes} yes, {n - yes} no; expected as many of each")
    return found
