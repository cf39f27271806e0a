"""ScienceQA: multiple-choice questions of school science; the usual figure is that of questions with a picture (IMG).

Source: Lu et al., "Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering", NeurIPS
2022, arXiv 2209.09513; github.com/lupantech/ScienceQA. Answers are read by LLaVA's or lmms-eval's rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError, UnknownName
from vislm.eval.prompts import suffix_text
from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict, mean_score
from vislm.eval.questions.choice_answers import LETTERS, scienceqa_answer
from vislm.eval.reading import (
    Fault,
    build_rows,
    find_file,
    find_folder,
    read_json,
    safe_path,
    text_of,
    texts_of,
    whole_of,
)

SPLITS = ("test", "val", "train", "minitest", "minival")
_ID = "problem"


@dataclass(frozen=True)
class ScienceQuestion:
    """One problem."""

    id: str
    image: Path | None
    text: str
    choices: tuple[str, ...]
    answer: str
    """The right letter."""
    subject: str
    context: str
    """"image", "text" or "none": what comes with the question; a picture counts before a hint."""


@dataclass(frozen=True)
class ScienceQa(Benchmark):
    """ScienceQA; answers without a readable letter are wrong."""

    questions: Sequence[ScienceQuestion]
    settings: Mapping[str, Any]
    rule: str = "llava"
    control: Control = "none"
    faults: Sequence[str] = field(default_factory=list)
    name = "scienceqa"
    figures = (Figure("accuracy"),)

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per question."""
        end = suffix_text(self.settings["suffix"])
        return [
            Sample(
                q.id,
                (q.image,) if q.image else (),
                q.text + end,
                truth=q.answer,
                group=q.id,  # every problem has an image.png of its own
            )
            for q in self.questions
        ]

    @cached_property
    def _by_id(self) -> dict[str, ScienceQuestion]:
        return {q.id: q for q in self.questions}

    @property
    def protocol(self) -> dict[str, Any]:
        """Split, suffix, subset and rule."""
        return {**self.settings, "parser": self.rule, "n_questions": len(self.questions)}

    def parse(self, row: Row) -> Verdict:
        """Return the letter that was chosen, None without one."""
        question, answer = self._by_id[row["id"]], scienceqa_answer(row["text"], self.rule)
        return Verdict(answer, float(answer == question.answer), {}, (question.context, question.subject))

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return the accuracy over all rows, and the number of answers without a letter."""
        unparsed = sum(self.parse(row).answer is None for row in rows.values())
        metrics: dict[str, Any] = {"accuracy": mean_score(self, rows), "n": len(rows), "n_unparsed": unparsed}
        return metrics if rows else {**metrics, "warnings": ["accuracy has no denominator"]}

    def groups(self, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return the accuracy by context (image, text, none) and by subject."""
        parts: dict[str, dict[str, Row]] = {}
        for row in rows.values():
            question = self._by_id[row["id"]]
            for part in (question.context, question.subject):
                parts.setdefault(part, {})[question.id] = row
        return {p: {"accuracy": mean_score(self, parts[p]), "n": len(parts[p])} for p in sorted(parts)}


def load(
    path: Path,
    *,
    split: str = "test",
    images_only: bool = True,
    suffix: str = "letter",
    parser: str = "llava",
    control: Control = "none",
) -> ScienceQa:
    """Read ScienceQA.

    Args:
        path: folder with problems.json, pid_splits.json and a folder per split: test/4/image.png.
        split: test (4,241 problems, 2,017 of them with a picture), val, train, minitest or minival.
        images_only: leave out problems without a picture (the IMG figure).
        suffix: see ``vislm.eval.prompts.SUFFIXES``.
        parser: llava or lmms-eval.
        control: grey pictures or not.

    Raises:
        AnnotationError: files that are missing or no JSON; bad problems become ``faults`` instead.
    """
    scienceqa_answer("", parser)
    if split not in SPLITS:
        raise UnknownName("split of ScienceQA", split, SPLITS)
    file = find_file(path, ["problems.json", "data/scienceqa/problems.json"], "ScienceQA problems")
    splits = find_file(path, ["pid_splits.json", "data/scienceqa/pid_splits.json"], "ScienceQA splits")
    problems, wanted = read_json(file, dict, unique_keys=True), read_json(splits, dict).get(split)
    if not isinstance(wanted, list) or not all(isinstance(key, str) for key in wanted):
        raise AnnotationError(f"{splits}: no list of problem numbers under {split!r}")
    real = split.removeprefix("mini")
    images = find_folder(path, [real, f"images/{real}", f"data/scienceqa/images/{real}"])
    faults = [f"{splits.name}: {split} names the unknown problem {key!r}" for key in wanted if key not in problems]
    rows = [_keyed(key, problems[key]) for key in dict.fromkeys(wanted) if key in problems]
    found = build_rows(file, rows, lambda row: _question(row, images), faults, id_key=_ID)
    kept = [q for q in found if q.image is not None or not images_only]
    settings = {"split": split, "images_only": images_only, "suffix": suffix}
    return ScienceQa(kept, settings, parser, control, faults)


def _keyed(key: str, row: Any) -> Any:
    return {**row, _ID: key} if isinstance(row, dict) else row


def _question(row: dict[str, Any], images: Path) -> ScienceQuestion:
    choices = texts_of(row, "choices")
    if not 2 <= len(choices) <= len(LETTERS):
        raise Fault(f"has {len(choices)} choices; expected 2 to {len(LETTERS)}")
    answer = whole_of(row, "answer", 0, len(choices))
    hint = text_of(row, "hint", empty=True).strip() if row.get("hint") is not None else ""
    lines = [f"Context: {hint}"] if hint else []
    lines += [
        text_of(row, "question"),
        *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)),
    ]
    image = safe_path(images, f"{row[_ID]}/{text_of(row, 'image')}") if row.get("image") is not None else None
    context = "image" if image else "text" if hint else "none"
    subject = text_of(row, "subject")
    return ScienceQuestion(row[_ID], image, "\n".join(lines), tuple(choices), LETTERS[answer], subject, context)
