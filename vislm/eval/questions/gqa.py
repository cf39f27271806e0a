"""GQA: compositional questions with one-word answers, made from scene graphs.

Source: Hudson and Manning, "GQA: A New Dataset for Real-World Visual Reasoning and Compositional Question Answering",
CVPR 2019, arXiv 1902.09506; cs.stanford.edu/people/dorarad/gqa.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.errors import UnknownName
from vislm.eval.prompts import suffix_text
from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict, mean_score
from vislm.eval.reading import build_rows, find_file, find_folder, id_of, read_json, safe_path, text_of

RULES = ("llava", "lmms-eval")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class GqaQuestion:
    """One question with the answer that the scene graph gives."""

    id: str
    image: Path
    text: str
    answer: str
    kind: str
    """Structural type: query, verify, choose, logical or compare."""


@dataclass(frozen=True)
class Gqa(Benchmark):
    """GQA; an answer is right or wrong."""

    questions: Sequence[GqaQuestion]
    settings: Mapping[str, Any]
    rule: str = "llava"
    control: Control = "none"
    faults: Sequence[str] = field(default_factory=list)
    name = "gqa"
    figures = (Figure("accuracy"),)

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per question."""
        end = suffix_text(self.settings["suffix"])
        return [Sample(q.id, (q.image,), q.text + end, truth=q.answer) for q in self.questions]

    @cached_property
    def _by_id(self) -> dict[str, GqaQuestion]:
        return {q.id: q for q in self.questions}

    @property
    def protocol(self) -> dict[str, Any]:
        """Split, suffix and rule of comparison."""
        return {**self.settings, "parser": self.rule, "n_questions": len(self.questions)}

    def parse(self, row: Row) -> Verdict:
        """Compare the answer with the one that is right."""
        question, answer = self._by_id[row["id"]], comparable(row["text"], self.rule)
        right = comparable(question.answer, self.rule)
        return Verdict(answer, float(answer == right), {}, (question.kind,) if question.kind else ())

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return the accuracy, a fraction."""
        metrics: dict[str, Any] = {"accuracy": mean_score(self, rows), "n": len(rows)}
        return metrics if rows else {**metrics, "warnings": ["accuracy has no denominator"]}

    def groups(self, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return the accuracy for each structural type."""
        kinds = sorted({self._by_id[i].kind for i in rows} - {""})
        chosen = {kind: {i: r for i, r in rows.items() if self._by_id[i].kind == kind} for kind in kinds}
        return {kind: {"accuracy": mean_score(self, part), "n": len(part)} for kind, part in chosen.items()}


def comparable(answer: str, rule: str) -> str:
    """Return an answer as it is compared: in lower case, without final periods (llava) or any punctuation (lmms-eval).

    Raises:
        UnknownName: no such rule.
    """
    if rule == "llava":
        return answer.rstrip(".").lower()
    if rule == "lmms-eval":
        return answer.lower().translate(_NO_PUNCTUATION)
    raise UnknownName("GQA rule", rule, RULES)


def load(
    path: Path,
    *,
    split: str = "testdev_balanced",
    suffix: str = "short",
    parser: str = "llava",
    control: Control = "none",
) -> Gqa:
    """Read GQA.

    Args:
        path: folder with testdev_balanced_questions.json (or questions1.2/ with it) and images/.
        split: the questions file's name without "_questions.json": testdev_balanced (12,578), val_balanced, ...
        suffix: see ``vislm.eval.prompts.SUFFIXES``.
        parser: llava or lmms-eval.
        control: grey pictures or not.

    Raises:
        AnnotationError: a file that is missing, no JSON, or holds a question id twice; bad rows become ``faults``.
    """
    comparable("", parser)
    names = [f"{folder}{split}_questions.json" for folder in ("", "questions1.2/", "questions/")]
    file = find_file(path, names, "GQA questions")
    images = find_folder(path, ["images"])

    def question(row: dict[str, Any]) -> GqaQuestion:
        types = row.get("types")
        kind = types.get("structural") if isinstance(types, dict) else None
        picture = safe_path(images, f"{id_of(row, 'imageId')}.jpg")
        text, answer = text_of(row, "question"), text_of(row, "answer")
        return GqaQuestion(row[_ID], picture, text, answer, kind if isinstance(kind, str) else "")

    faults: list[str] = []
    table = read_json(file, dict, unique_keys=True)
    rows = [{**row, _ID: key} if isinstance(row, dict) else row for key, row in table.items()]
    questions = build_rows(file, rows, question, faults, id_key=_ID)
    return Gqa(questions, {"split": split, "suffix": suffix}, parser, control, faults)


_ID = "question id"
