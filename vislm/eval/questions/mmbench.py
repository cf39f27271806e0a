"""MMBench: multiple choice in twenty abilities, each question asked once for every rotation of its options.

Source: Liu et al., "MMBench: Is Your Multi-modal Model an All-around Player?", ECCV 2024, arXiv 2307.06281;
github.com/open-compass/MMBench. Options are read out of answers as VLMEvalKit does without a judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.errors import UnknownName
from vislm.eval.prompts import LETTER
from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict
from vislm.eval.questions.choice_answers import LETTERS, mmbench_answer
from vislm.eval.questions.mmbench_file import PASS, Choice, read_table

SCORINGS = ("extract", "likelihood")
PROMPTS = ("llava", "vlmevalkit")


@dataclass(frozen=True)
class MmBench(Benchmark):
    """MMBench. In circular evaluation a question counts only if every rotation of its options is answered rightly."""

    choices: Sequence[Choice]
    settings: Mapping[str, Any]
    scoring: str = "extract"
    prompt: str = "llava"
    control: Control = "none"
    faults: Sequence[str] = field(default_factory=list)
    name = "mmbench"
    max_new_tokens = 64
    figures = (Figure("accuracy"),)  # of single rotations; the rotations of a question are one group

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per question and rotation; the rotations of a question form a group."""
        return [self._sample(choice) for choice in self.choices]

    def _sample(self, choice: Choice) -> Sample:
        choices = tuple(choice.options) if self.scoring == "likelihood" else ()
        text, group = prompt_of(choice, self.prompt), str(choice.question)
        return Sample(str(choice.index), (choice.image,), text, choice.answer, choices=choices, group=group)

    @cached_property
    def _by_id(self) -> dict[str, Choice]:
        return {str(choice.index): choice for choice in self.choices}

    @property
    def protocol(self) -> dict[str, Any]:
        """File, rotations, prompt and how answers are read."""
        questions = len({c.question for c in self.choices})
        return {**self.settings, "prompt": self.prompt, "parser": self.scoring, "n_questions": questions}

    def parse(self, row: Row) -> Verdict:
        """Return the chosen letter, None without one; questions whose answers are secret do not count."""
        choice = self._by_id[row["id"]]
        letter = row["text"] if self.scoring == "likelihood" else mmbench_answer(row["text"], choice.options)
        parts = tuple(filter(None, dict.fromkeys((choice.ability, choice.category))))
        return Verdict(letter, None if choice.answer is None else float(letter == choice.answer), {}, parts)

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return "vanilla" (first rotation), "circular" where there are rotations, and answers without a letter."""
        metrics = self._metrics(rows)
        metrics["n_unparsed"] = sum(self.parse(row).answer is None for row in rows.values())
        warnings = [] if metrics["n"] else ["accuracy has no denominator"]
        if any(self._by_id[i].answer is None for i in rows):
            warnings.append("questions without a published answer: send theirs to the official server")
        partial = self._incomplete(rows)
        if partial:
            warnings.append(f"{partial} questions are not yet asked in all rotations and count as those that were")
        return {**metrics, "warnings": warnings} if warnings else metrics

    def groups(self, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return the figures for each ability (the official table's columns) and each category."""
        parts: dict[str, dict[str, Row]] = {}
        for i, row in rows.items():
            choice = self._by_id[i]
            for name in dict.fromkeys(filter(None, (choice.ability, choice.category))):
                parts.setdefault(name, {})[i] = row
        return {name: self._metrics(parts[name]) for name in sorted(parts)}

    def _metrics(self, rows: Rows) -> dict[str, Any]:
        right: dict[int, dict[int, bool]] = {}
        for i, row in rows.items():
            score = self.parse(row).score
            if score is not None:
                right.setdefault(self._by_id[i].question, {})[self._by_id[i].rotation] = bool(score)
        first = [passes[0] for passes in right.values() if 0 in passes]
        metrics: dict[str, Any] = {"vanilla": sum(first) / max(1, len(first))}
        if self.settings["circular"]:
            metrics["circular"] = sum(all(passes.values()) for passes in right.values()) / max(1, len(right))
        return {**metrics, "n": len(right)}

    def _incomplete(self, rows: Rows) -> int:
        missing = {choice.question for i, choice in self._by_id.items() if i not in rows}
        return len(missing & {self._by_id[i].question for i in rows})


def prompt_of(choice: Choice, style: str) -> str:
    """Return the question with its hint and options, as LLaVA or VLMEvalKit words it."""
    options = [f"{letter}. {text}" for letter, text in choice.options.items()]
    if style == "vlmevalkit":
        lines = [f"Hint: {choice.hint}"] if choice.hint else []
        lines += [f"Question: {choice.text}", "Options:", *options]
        return "\n".join([*lines, "Please select the correct answer from the options above. \n"])
    return "\n".join([*([choice.hint] if choice.hint else []), choice.text, *options]) + LETTER


def load(
    path: Path,
    *,
    circular: bool = True,
    scoring: str = "extract",
    prompt: str = "llava",
    control: Control = "none",
) -> MmBench:
    """Read MMBench.

    Args:
        path: the official TSV (MMBench_DEV_EN.tsv, mmbench_dev_20230712.tsv, ...) or a folder with one such file. Its
            pictures are base64 cells.
        circular: ask every question in all rotations of its options (index + 1,000,000 for each further rotation).
            Files that already hold the rotations keep theirs.
        scoring: "extract" reads the letter out of a free answer; "likelihood" takes the letter that the model finds
            likeliest, so that no answer is unreadable.
        prompt: "llava" or "vlmevalkit".
        control: grey pictures or not.

    Raises:
        UnknownName: no such scoring or prompt.
        AnnotationError: no file, or one that is no such table; bad rows become ``faults`` instead.
    """
    for kind, value, valid in (("scoring of MMBench", scoring, SCORINGS), ("prompt of MMBench", prompt, PROMPTS)):
        if value not in valid:
            raise UnknownName(kind, value, valid)
    faults: list[str] = []
    file, choices = read_table(path, faults)
    if not circular:
        choices = [choice for choice in choices if choice.index < PASS]
    elif all(choice.index < PASS for choice in choices):
        choices = [turned for choice in choices for turned in rotations(choice)]
    return MmBench(choices, {"file": file.name, "circular": circular}, scoring, prompt, control, faults)


def rotations(choice: Choice) -> list[Choice]:
    """Return a question once for every option that can come first; the first is the question as it is."""
    texts = list(choice.options.values())
    n = len(texts)
    turned = []
    for shift in range(n):
        options = dict(zip(LETTERS, texts[shift:] + texts[:shift], strict=False))
        answer = None if choice.answer is None else LETTERS[(LETTERS.index(choice.answer) - shift) % n]
        turned.append(choice.turned(choice.index + shift * PASS, options, answer))
    return turned


def suspicions(benchmark: MmBench) -> list[str]:
    """Return what is no fault but not as published: questions that lack rotations of their options."""
    passes: dict[int, list[Choice]] = {}
    for choice in benchmark.choices:
        passes.setdefault(choice.question, []).append(choice)
    return [
        f"question {question}: {len(asked)} rotations of {len(asked[0].options)} options"
        for question, asked in passes.items()
        if benchmark.settings["circular"] and len(asked) != len(asked[0].options)
    ]
