"""What TextVQA, VQAv2 and VizWiz share: ten people's answers to each question, and how far a model agrees with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict
from vislm.eval.questions.vqa_answers import consensus, normalise
from vislm.eval.reading import Fault, shown

PEOPLE = 10
"""Answers that every annotated question has."""


@dataclass(frozen=True)
class HumanQuestion:
    """A question with people's answers; none in test splits, whose answers are secret."""

    id: str
    image: Path
    prompt: str
    answers: tuple[str, ...]
    kind: str = ""
    """The data set's type of answer; figures are given for each."""


@dataclass(frozen=True)
class HumanAnswers(Benchmark):
    """Questions with ten people's answers; the score of an answer is how far people agree with it."""

    questions: Sequence[HumanQuestion]
    settings: Mapping[str, Any]
    """Split, prompt suffix and what else a result must state."""
    control: Control = "none"
    figures = (Figure("accuracy"),)
    faults: Sequence[str] = field(default_factory=list)

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per question."""
        return [Sample(q.id, (q.image,), q.prompt, truth=list(q.answers)) for q in self.questions]

    @cached_property
    def _by_id(self) -> dict[str, HumanQuestion]:
        return {q.id: q for q in self.questions}

    @property
    def protocol(self) -> dict[str, Any]:
        """Split, suffix, and the rule of comparison."""
        return {**self.settings, "parser": "evalai", "n_questions": len(self.questions)}

    def parse(self, row: Row) -> Verdict:
        """Return the normalised answer and its agreement with people, 0 to 1; None where answers are secret."""
        question, answer = self._by_id[row["id"]], normalise(row["text"])
        parts = (question.kind,) if question.kind else ()
        if not question.answers:
            return Verdict(answer, None, {}, parts)
        return Verdict(answer, consensus(question.answers).get(answer, 0.0), {}, parts)

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return the mean agreement as "accuracy", a fraction."""
        metrics = self._accuracy(rows)
        secret = len(rows) - metrics["n"]
        if secret:
            metrics["warnings"] = [f"{secret} questions have no published answers: send theirs to the official server"]
        elif not metrics["n"]:
            metrics["warnings"] = ["accuracy has no denominator"]
        return metrics

    def groups(self, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return the accuracy for each kind of answer."""
        kinds = sorted({self._by_id[i].kind for i in rows} - {""})
        return {k: self._accuracy({i: r for i, r in rows.items() if self._by_id[i].kind == k}) for k in kinds}

    def _accuracy(self, rows: Rows) -> dict[str, Any]:
        scores = [s for row in rows.values() if (s := self.parse(row).score) is not None]
        return {"accuracy": sum(scores) / max(1, len(scores)), "n": len(scores)}


def answers_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the ten answers of a row, given as texts or as objects with "answer"; none if the row has no "answers"."""
    found = row.get("answers")
    if found is None:
        return ()
    if not isinstance(found, list):
        raise Fault(f"answers is {shown(found)}; expected a list")
    answers = [text for a in found if isinstance(text := a.get("answer") if isinstance(a, dict) else a, str)]
    if len(answers) != len(found):
        raise Fault("answers holds something that is no text")
    if len(answers) != PEOPLE:
        raise Fault(f"has {len(answers)} answers; expected {PEOPLE}")
    return tuple(answers)
