"""What a benchmark is: samples, how an answer is judged, and how verdicts become metrics. Needs no model and no torch.

The runner does the rest: it decodes pictures, asks the model, writes one row per sample, resumes and shards. To add a
benchmark, write one module with a subclass of :class:`Benchmark`::

    @dataclass(frozen=True)
    class Gqa(Benchmark):
        root: Path
        questions: Mapping[str, dict[str, str]]
        control: Control = "none"
        name = "gqa"
        max_new_tokens = 16

        @cached_property
        def samples(self) -> list[Sample]:
            return [
                Sample(i, (self.root / f"{q['imageId']}.jpg",), q["question"] + SHORT, truth=q["answer"])
                for i, q in self.questions.items()
            ]

        @property
        def protocol(self) -> dict[str, Any]:
            return {"suffix": SHORT, "parser": "lower-case, final period off"}

        def parse(self, row: Row) -> Verdict:
            answer = row["text"].strip().lower().rstrip(".")
            return Verdict(answer, float(answer == self.questions[row["id"]]["answer"].lower()))

        def aggregate(self, rows: Rows) -> dict[str, Any]:
            return {"accuracy": mean_score(self, rows), "n": len(rows)}
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

Row = Mapping[str, Any]
"""One finished sample. Always there: "id", "text" (what the model said, stripped). From the runner: "images" (names),
"group", "prompt", "truth", "answer", "score" and, where the benchmark gives them, "values" and "parts". From an LMM:
"candidates" (word -> logit), "likelihoods" (one log-probability per choice), "visual_tokens", "visual_tokens_kept",
"seconds". Models of other subjects add their own keys ("top", "boxes", ...); all values are JSON."""

Rows = Mapping[str, Row]
"""Sample id -> row, in the order of the samples; samples that broke or are not done yet are absent."""

Control = Literal["none", "grey"]
"""grey: every picture is replaced by a plain grey one; what is still right comes from language alone."""


@dataclass(frozen=True)
class Stored:
    """An encoded picture that is no file of its own, such as a base64 cell of a table."""

    name: str
    """For messages and for the row."""
    data: bytes = field(repr=False)
    """The bytes of a PNG, JPEG, ... file."""


Picture = Path | Stored


@dataclass(frozen=True)
class Sample:
    """One thing to ask."""

    id: str
    """Unique within the benchmark; rows and samples are joined by it, never by order."""
    images: tuple[Picture, ...]
    """None, one or several; a prompt may place them with the model's own placeholders only."""
    prompt: str
    """The question with its suffix, without the model's chat template; empty for subjects that read no text."""
    truth: Any = None
    """What is right, as JSON (a label, ten people's answers, the objects shown); stored in the row for readers."""
    candidates: tuple[str, ...] = ()
    """Words whose logits at the first answer position are wanted, e.g. ("yes", "no") or ("A", "B", "C", "D")."""
    choices: tuple[str, ...] = ()
    """Whole answers whose log-probabilities are wanted (the row's "likelihoods"); the model then generates nothing and
    "text" is the likeliest choice."""
    group: str = ""
    """What samples that are not independent share; empty: the first picture's name, or else the id. Standard errors
    and bootstraps draw whole groups."""

    @property
    def image_names(self) -> list[str]:
        """Name of every picture."""
        return [image.name for image in self.images]

    @property
    def cluster(self) -> str:
        """The group, with its default."""
        return self.group or next(iter(self.image_names), self.id)


@dataclass(frozen=True)
class Verdict:
    """What one answer is worth."""

    answer: Any
    """The parsed answer, as JSON; None where the rule could not read it."""
    score: float | None
    """1.0 right, 0.0 wrong, in between where answers are partly right; None: does not count (``compare`` leaves the
    sample out)."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Further numbers that ``figures`` are made of, e.g. {"mentions": 7, "hallucinated": 1}."""
    parts: tuple[str, ...] = ()
    """Splits or sub-tasks that the sample belongs to; ``compare`` shows each beside the whole."""


@dataclass(frozen=True)
class Figure:
    """A number over many samples that two runs are compared by, in terms of the values of each sample.

    kind: "mean" of one column; "ratio": sum of the first column over sum of the second; "f1": of columns of truth and
    prediction (1 positive, 0 negative); "auroc": of columns of truth and margin. The column "score" is the verdict's;
    samples that lack one of the columns are left out.
    """

    name: str = "score"
    kind: Literal["mean", "ratio", "f1", "auroc"] = "mean"
    columns: tuple[str, ...] = ("score",)
    better: Literal["higher", "lower", "neither"] = "higher"


class Benchmark(abc.ABC):
    """Samples, a parser and a metric. Subclasses are frozen dataclasses in a module of their own.

    The plain attributes below are defaults: override them as class attributes, or as dataclass fields where instances
    differ. Declare ``control: Control = "none"`` as a field; ``load_benchmark`` sets it.
    """

    name: str
    """Short name, as on the command line."""
    control: Control = "none"
    max_new_tokens: int = 16
    """Upper limit of an answer."""
    subject: str = "lmm"
    """What kind of model answers; see ``vislm.eval.running.subjects``."""
    figures: tuple[Figure, ...] = (Figure(),)
    """What ``vislm compare`` shows."""
    faults: Sequence[str] = ()
    """Rows of the annotations that the reader had to leave out, each named by line or id. The runner stops at them, or
    with ``on_error="skip"`` lists them in the results; nothing takes their place."""

    @cached_property
    def samples(self) -> Sequence[Sample]:
        """All samples with unique ids, always in the same order; subclasses define it, built once."""
        raise NotImplementedError(f"{type(self).__name__} defines no samples")

    @property
    @abc.abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What a result must state besides model, samples and control: prompt suffix, parser, origin of the questions.

        Flat, JSON; part of the fingerprint, so nothing in it may depend on the machine or the day.
        """

    @abc.abstractmethod
    def parse(self, row: Row) -> Verdict:
        """Judge one answer; a pure function of the row and of the annotations. Called once a sample is finished, and
        again when predictions are scored anew, where only "id", "text" and perhaps "candidates" are there."""

    @abc.abstractmethod
    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return the metrics of the rows that are there (none at all included: 0.0 and a text under "warnings")."""

    def groups(self, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return figures per object, category, ...; nothing by default."""
        return {}


def mean_score(benchmark: Benchmark, rows: Rows) -> float:
    """Return the mean score of the rows that count; 0.0 without any."""
    scores = [s for row in rows.values() if (s := benchmark.parse(row).score) is not None]
    return sum(scores) / max(1, len(scores))


@dataclass(frozen=True)
class Asked:
    """A sample with its pictures decoded (RGB, upright)."""

    sample: Sample
    images: tuple[Image.Image, ...]


class Subject(Protocol):
    """A model as the runner sees it. ``vislm.LMM`` is wrapped into one; classifiers, embedders, ... bring their own."""

    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> Sequence[dict[str, Any]]:
        """Return what goes into each sample's row, as JSON: at least "text" (may be empty) and "seconds" (wall time of
        the batch divided by its size)."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines the answers, flat: weights, preprocessing, interventions with options, decoding."""
        ...
