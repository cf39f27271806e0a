"""MME: two yes/no questions about each picture, one of each answer, in ten tasks of perception and four of cognition.

Source: Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models", arXiv 2306.13394;
github.com/BradyFU/Awesome-Multimodal-Large-Language-Models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError, UnknownName, UsageError
from vislm.eval.prompts import SHORT
from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict
from vislm.eval.questions.yes_no import margin, ranking, ranking_warnings
from vislm.eval.reading import read_text, shown

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION
PROMPTS = ("short", "official")
INSTRUCTION = "Please answer yes or no."
"""What every official question ends in."""
_SUFFIXES = (".jpg", ".png", ".jpeg")
_PER_IMAGE = 2
_SEEN = 4  # characters of an answer that the rule looks at


@dataclass(frozen=True)
class MmeQuestion:
    """One of the two questions about a picture."""

    id: str
    task: str
    image: Path
    text: str
    label: str
    """yes or no."""


@dataclass(frozen=True)
class Mme(Benchmark):
    """MME. A task's score is its accuracy plus the share of pictures with both answers right, both in percent."""

    questions: Sequence[MmeQuestion]
    prompt: str = "short"
    control: Control = "none"
    faults: Sequence[str] = field(default_factory=list)
    name = "mme"
    figures = (
        Figure("accuracy"),
        Figure("yes_ratio", "mean", ("answer",), better="neither"),
        Figure("auroc", "auroc", ("label", "margin")),
    )

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per question."""
        return [
            Sample(q.id, (q.image,), _asked(q.text, self.prompt), q.label, ("yes", "no"), group=_image_of(q.id))
            for q in self.questions
        ]

    @cached_property
    def _by_id(self) -> dict[str, MmeQuestion]:
        return {q.id: q for q in self.questions}

    @property
    def protocol(self) -> dict[str, Any]:
        """Prompt and parser."""
        return {"prompt": self.prompt, "parser": "first 4 characters", "n_questions": len(self.questions)}

    def parse(self, row: Row) -> Verdict:
        """Return yes, no, or None for other answers, which are wrong."""
        question, answer, yes_no = self._by_id[row["id"]], parse_answer(row["text"]), margin(row)
        values = {"label": float(question.label == "yes"), "answer": float(answer == "yes")}
        return Verdict(
            None if answer == "other" else answer,
            float(answer == question.label),
            values if yes_no is None else {**values, "margin": yes_no},
            (question.task, _area(question.task)),
        )

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return the sums of the tasks' scores: perception (at most 2000), cognition (800) and both.

        Beside them yes_ratio and, where rows hold logits, AUROC (fractions) over the questions of all tasks.
        """
        scores = {task: figures["score"] for task, figures in self.groups(rows).items()}
        sums = {
            area: sum(s for task, s in scores.items() if _area(task) == area) for area in ("perception", "cognition")
        }
        metrics: dict[str, Any] = {**sums, "total": sum(sums.values()), "n": len(rows)}
        positive = [self._by_id[i].label == "yes" for i in rows]
        margins = [margin(row) for row in rows.values()]
        said_yes = sum(parse_answer(row["text"]) == "yes" for row in rows.values())
        metrics |= {"yes_ratio": said_yes / max(1, len(rows)), **ranking(positive, margins)}
        missing = [task for task in TASKS if task not in scores]
        warnings = [f"no answers for {', '.join(missing)}"] if missing else []
        warnings += ranking_warnings(positive, margins)
        return {**metrics, "warnings": warnings} if warnings else metrics

    def groups(self, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return each task's accuracy, the share of pictures with both answers right ("accuracy_plus"), and score."""
        pictures: dict[str, dict[str, list[float]]] = {}
        for row in rows.values():
            question = self._by_id[row["id"]]
            right = self.parse(row).score or 0.0
            pictures.setdefault(question.task, {}).setdefault(_image_of(question.id), []).append(right)
        order = [task for task in TASKS if task in pictures] + sorted(pictures.keys() - set(TASKS))
        return {task: task_score(list(pictures[task].values())) for task in order}


def parse_answer(text: str) -> str:
    """Return "yes", "no" or "other": the whole answer, its only letter, or what its first four characters contain."""
    answer = text.lower().strip().replace(".", "")
    if answer in ("yes", "no"):
        return answer
    if answer in ("y", "n"):
        return "yes" if answer == "y" else "no"
    start = answer[:_SEEN]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def task_score(pictures: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return accuracy, accuracy_plus (percent) and their sum from what was right (1) or wrong (0) for each picture."""
    accuracy = 100 * sum(sum(right) / len(right) for right in pictures) / max(1, len(pictures))
    plus = 100 * sum(sum(right) == _PER_IMAGE for right in pictures) / max(1, len(pictures))
    return {"accuracy": accuracy, "accuracy_plus": plus, "score": accuracy + plus, "images": len(pictures)}


def _area(task: str) -> str:
    return "cognition" if task in COGNITION else "perception"


def _image_of(question: str) -> str:
    return question.rpartition("/")[0]


def _asked(text: str, prompt: str) -> str:
    return text if prompt == "official" else text.replace(INSTRUCTION, "").strip() + SHORT


def load(path: Path, *, prompt: str = "short", control: Control = "none") -> Mme:
    """Read MME.

    Args:
        path: MME_Benchmark_release_version: a folder per task, either with pictures and their .txt files side by side
            or with images/ and questions_answers_YN/. Every .txt holds two lines: question, tab, Yes or No.
        prompt: "short" puts LLaVA's suffix in place of "Please answer yes or no."; "official" asks as the files do.
        control: grey pictures or not.

    Raises:
        UsageError: no such folder.
        UnknownName: no such prompt.
        AnnotationError: none of the tasks is there; bad questions become ``faults`` instead.
    """
    if prompt not in PROMPTS:
        raise UnknownName("prompt of MME", prompt, PROMPTS)
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder")
    tasks = [task for task in TASKS if (path / task).is_dir()]
    if not tasks:
        raise AnnotationError(f"{path} holds none of MME's task folders: {', '.join(TASKS)}")
    faults: list[str] = []
    questions = [q for task in tasks for q in _task(path / task, task, faults)]
    return Mme(questions, prompt, control, faults)


def _task(folder: Path, task: str, faults: list[str]) -> Iterator[MmeQuestion]:
    apart = (folder / "questions_answers_YN").is_dir()
    texts = {f.stem: f for f in sorted((folder / "questions_answers_YN" if apart else folder).glob("*.txt"))}
    pictures = (folder / "images" if apart else folder).glob("*")
    images: Mapping[str, Path] = {f.stem: f for f in sorted(pictures) if f.suffix.lower() in _SUFFIXES}
    faults += [f"{task}: picture {shown(images[s].name)} has no questions" for s in images if s not in texts]
    for stem, file in texts.items():
        where = f"{task}/{file.name}"
        if stem not in images:
            faults.append(f"{where}: no picture {stem} with it")
            continue
        try:
            found = list(_lines(read_text(file), where, faults))
        except AnnotationError as error:
            faults.append(str(error))
            continue
        if len(found) != _PER_IMAGE:
            faults.append(f"{where}: {len(found)} questions; expected {_PER_IMAGE}")
            continue
        for number, (text, label) in enumerate(found, start=1):
            yield MmeQuestion(f"{task}/{images[stem].name}/{number}", task, images[stem], text, label)


def _lines(content: str, where: str, faults: list[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        text, tab, label = line.rstrip().rpartition("\t")
        if not tab or not text.strip() or label.strip() not in ("Yes", "No"):
            faults.append(f"{where}, line {number}: expected question, tab, Yes or No; got {shown(line)}")
            continue
        yield text.strip(), label.strip().lower()


def suspicions(benchmark: Mme) -> list[str]:
    """Return what is no fault but not as published: missing tasks, pictures whose two questions have one answer."""
    there = {q.task for q in benchmark.questions}
    found = [f"task {task}: no questions" for task in TASKS if task not in there]
    labels: dict[str, set[str]] = {}
    for question in benchmark.questions:
        labels.setdefault(_image_of(question.id), set()).add(question.label)
    return found + [f"{image}: both answers are {both.pop()}" for image, both in labels.items() if len(both) == 1]
