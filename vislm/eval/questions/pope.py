"""POPE: yes/no questions about objects that are there and objects that are not, in three splits.

Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, arXiv 2305.10355;
github.com/RUCAIBox/POPE. ``pope_sources`` finds or builds the questions, ``pope_answers`` parses and scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.errors import UnknownName, UsageError
from vislm.eval.coco import VAL2014
from vislm.eval.prompts import SUFFIXES, suffix_text
from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict
from vislm.eval.questions.pope_answers import metrics, parse
from vislm.eval.questions.pope_questions import SPLITS, Question, object_of
from vislm.eval.questions.pope_sources import find_questions
from vislm.eval.questions.scene_pope import oracle_table
from vislm.eval.questions.yes_no import MISSING, margin

_PER_IMAGE = 6
"""Questions per image and split of the published files."""
Answered = Sequence[tuple[Question, Row]]


@dataclass(frozen=True)
class Pope(Benchmark):
    """POPE. Questions that several splits share are asked once."""

    questions: Sequence[Question]
    paths: Mapping[str, Path]
    """Image name -> file."""
    rule: str = "official"
    how: str = "official files"
    suffix: str = "none"
    split: str = "all"
    control: Control = "none"
    objects: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Image name -> what it shows, where the oracles over scenes apply."""
    themes: Mapping[str, str | None] = field(default_factory=dict)
    faults: Sequence[str] = field(default_factory=list)
    name = "pope"
    max_new_tokens = 8
    figures = (
        Figure("accuracy"),
        Figure("f1", "f1", ("label", "answer")),
        Figure("yes_ratio", "mean", ("answer",), better="neither"),
        Figure("auroc", "auroc", ("label", "margin")),
    )

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per different pair of image and question; ids are the same for every suffix."""
        first = {key: asked[0] for key, asked in self._asked.items()}
        return [
            Sample(key, (self.paths[q.image],), self._prompt(q.text), truth=q.label, candidates=("yes", "no"))
            for key, q in first.items()
        ]

    def _prompt(self, text: str) -> str:
        return text if text.endswith(suffix_text(self.suffix)) else text + suffix_text(self.suffix)

    @cached_property
    def _asked(self) -> dict[str, list[Question]]:
        """Sample id -> the questions of the splits that it answers."""
        found: dict[str, list[Question]] = {}
        for question in self.questions:
            found.setdefault(_key(question), []).append(question)
        return found

    @property
    def protocol(self) -> dict[str, Any]:
        """Origin of the questions, split, parser and suffix."""
        return {
            "questions": self.how,
            "split": self.split,
            "parser": self.rule,
            "suffix": self.suffix,
            "n_questions": len(self.questions),
        }

    def parse(self, row: Row) -> Verdict:
        """Return yes, no, or what the rule makes of other answers."""
        asked, answer = self._asked[row["id"]], parse(row["text"], self.rule)
        values = {"label": float(asked[0].label == "yes"), "answer": float(answer == "yes")}
        yes_no = margin(row)
        if yes_no is not None:
            values["margin"] = yes_no
        parts = tuple(dict.fromkeys(q.split for q in asked))
        if answer == "dropped":
            return Verdict(None, None, {}, parts)
        return Verdict(answer, float(answer == asked[0].label), values, parts)

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return the metrics of each split and, as "mean", of all of them unweighted; for scenes the oracles', too."""
        answered: dict[str, list[tuple[Question, Row]]] = {}
        for question in self.questions:
            if _key(question) in rows:
                answered.setdefault(question.split, []).append((question, rows[_key(question)]))
        result: dict[str, Any] = {split: self._metrics(found) for split, found in answered.items()}
        result["mean"] = _mean(result)
        return {**result, "oracles": self._oracles} if self.objects else result

    @cached_property
    def _oracles(self) -> dict[str, Any]:
        return oracle_table(self.questions, self.objects, self.themes)

    def groups(self, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return the metrics of the questions about each object, all splits together."""
        found: dict[str, list[tuple[Question, Row]]] = {}
        for question in self.questions:
            name = object_of(question.text)
            if name and _key(question) in rows:
                found.setdefault(name, []).append((question, rows[_key(question)]))
        figures = {name: self._metrics(found[name]) for name in sorted(found)}
        return {name: {k: m[k] for k in ("n", "accuracy", "recall", "yes_ratio")} for name, m in figures.items()}

    def _metrics(self, answered: Answered) -> dict[str, Any]:
        return metrics(
            [q.label for q, _ in answered],
            [parse(r["text"], self.rule) for _, r in answered],
            [margin(r) for _, r in answered],
        )


def _mean(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the unweighted mean of the splits, and what keeps its AUROC from being that of the same answers."""
    shared = [k for k in ("accuracy", "f1", "yes_ratio", "auroc") if all(k in m for m in splits.values())]
    mean: dict[str, Any] = {k: sum(m[k] for m in splits.values()) / max(1, len(splits)) for k in shared}
    without = [name for name, m in splits.items() if "auroc" not in m]
    partly = {name: m[MISSING] for name, m in splits.items() if MISSING in m}
    if partly and not without:
        mean[MISSING] = sum(partly.values())
        mean["warnings"] = [f"auroc leaves out answers without the logits of yes and no: {_counted(partly)}"]
    elif 0 < len(without) < len(splits):
        mean["warnings"] = [f"no auroc: no answer of {', '.join(without)} has the logits of yes and no"]
    return mean


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{n} in {name}" for name, n in numbers.items())


def _key(question: Question) -> str:
    return f"{question.image}|{question.text}"


def load(
    path: Path,
    *,
    source: str = "auto",
    split: str = "all",
    parser: str = "official",
    suffix: str = "none",
    seed: int = 0,
    draw: int | None = None,
    files: str = "",
    coco: str = VAL2014,
    control: Control = "none",
) -> Pope:
    """Read POPE.

    Args:
        path: folder with ...random.json, ...popular.json, ...adversarial.json (any of them) or one file of all splits,
            and images/ or val2014/; or a folder in COCO's format, from which questions are built.
        source: files; coco: build by the official algorithm; scenes: of ``vislm data scenes``, which keep their own
            questions; auto: files where there are any (and nothing is to be drawn), else scenes or coco.
        split: random, popular, adversarial, or all.
        parser: official, lmms-eval, pai (also SPIN's) or vlmevalkit; see ``pope_answers.PARSERS``.
        suffix: see ``vislm.eval.prompts.SUFFIXES``: none (as in the files), short (LLaVA), yes-no, one-word (VCD).
        seed: of built questions.
        draw: number of images to draw for built questions, 500 in the paper; None: all that show three objects.
        files: pattern of the question files where a folder holds several sets, e.g. aokvqa_*.json.
        coco: the part of COCO's own layout: annotations/instances_val2014.json, val2014/.
        control: grey pictures or not.

    Raises:
        UnknownName: no such source, split, parser or suffix.
        UsageError: the files' questions end in another suffix already, or ``draw`` for what is not drawn.
        AnnotationError: a folder that is incomplete. Broken rows and questions with both labels become ``faults``.
    """
    parse("", parser)
    suffix_text(suffix)
    faults: list[str] = []
    found = find_questions(path, source=source, files=files, coco=coco, draw=draw, seed=seed, faults=faults)
    known = [*dict.fromkeys(q.split for q in found.questions), "all"]
    if split not in known:
        raise UnknownName("POPE split", split, known)
    wanted = [q for q in found.questions if split in ("all", q.split)]
    _check_suffix(wanted, suffix)
    questions = _unambiguous(wanted, faults)
    return Pope(questions, found.paths, parser, found.how, suffix, split, control, found.objects, found.themes, faults)


def _check_suffix(questions: Sequence[Question], suffix: str) -> None:
    """Refuse to put a suffix behind another one, which LLaVA's question file, for one, comes with."""
    for name, text in SUFFIXES.items():
        if text and suffix not in ("none", name) and any(q.text.endswith(text) for q in questions):
            raise UsageError(f"the questions already end in the suffix {name!r}; use suffix=none, not {suffix}")


def _unambiguous(questions: Sequence[Question], faults: list[str]) -> list[Question]:
    """Leave out questions that are labelled both yes and no."""
    labels: dict[str, set[str]] = {}
    for q in questions:
        labels.setdefault(_key(q), set()).add(q.label)
    both = {key for key, found in labels.items() if len(found) > 1}
    faults += [f"{q.id}: {q.text!r} about {q.image} is labelled both yes and no" for q in questions if _key(q) in both]
    return [q for q in questions if _key(q) not in both]


def suspicions(benchmark: Pope) -> list[str]:
    """Return what is no fault but not as published: missing splits, unequal labels, images without six questions."""
    found = []
    splits = Counter(q.split for q in benchmark.questions)
    if benchmark.how.startswith("official files"):
        expected = SPLITS if benchmark.split == "all" else (benchmark.split,)
        found += [f"split {split}: no questions" for split in expected if split not in splits]
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
