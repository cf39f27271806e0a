"""k nearest neighbours on frozen features: a picture is of the class that its nearest training pictures vote for.

Two runs: the first embeds the training pictures, one row with the features each (float32 or float16 in base64, so that
a killed run resumes and processes share the work like in any other run); the second embeds the test pictures and keeps
the votes only. Protocol and sources: see ``knn_vote``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from vislm.errors import AnnotationError, UsageError
from vislm.eval.protocol import Benchmark, Control, Row, Rows, Sample, Verdict
from vislm.eval.reading import find_folder
from vislm.eval.running.store import RESULTS, read_json
from vislm.eval.vision.class_lists import ClassList
from vislm.eval.vision.image_folder import Labelled
from vislm.eval.vision.imagenet import TOP_FIGURES, top_metrics, top_verdict
from vislm.eval.vision.imagenet_variants import read_custom

KS = (10, 20, 100, 200)
Store = Literal["float32", "float16"]


@dataclass(frozen=True)
class FeatureSample(Sample):
    """A picture to be embedded."""

    store: Store = "float32"
    """How the features are written."""


@dataclass(frozen=True, eq=False)
class Votes:
    """How neighbours vote, and where they are."""

    bank: Path | None
    """Run folder of the training features."""
    labels: Mapping[str, int] = field(repr=False)
    """Training picture -> class."""
    classes: ClassList = field(repr=False)
    k: int
    """Neighbours whose vote is the answer."""
    ks: tuple[int, ...]
    """Numbers of neighbours whose votes are kept, ``k`` among them."""
    temperature: float


NO_VOTES = Votes(None, {}, ClassList(()), 1, (1,), 1.0)


@dataclass(frozen=True)
class QuerySample(Sample):
    """A picture whose class is asked of its neighbours."""

    votes: Votes = field(default=NO_VOTES, repr=False)


@dataclass(frozen=True)
class Bank(Benchmark):
    """The training pictures: nothing to judge, only to embed."""

    pictures: Sequence[Labelled]
    store: Store
    settings: Mapping[str, Any]
    control: Control = "none"
    faults: Sequence[str] = field(default_factory=list)
    name = "knn_train"
    subject = "features"
    figures = ()
    max_new_tokens = 1

    @cached_property
    def samples(self) -> list[FeatureSample]:
        """One sample per training picture."""
        return [FeatureSample(p.id, (p.path,), "", group=p.id, store=self.store) for p in self.pictures]

    @property
    def protocol(self) -> dict[str, Any]:
        """How features are written."""
        return dict(self.settings)

    def parse(self, row: Row) -> Verdict:
        """Features are not right or wrong."""
        return Verdict("", None)

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return how many there are."""
        return {"n": len(rows)}


@dataclass(frozen=True)
class Knn(Benchmark):
    """Test pictures whose classes the training pictures tell."""

    pictures: Sequence[Labelled]
    votes: Votes
    before: Bank
    """What has to be run first."""
    settings: Mapping[str, Any]
    control: Control = "none"
    faults: Sequence[str] = field(default_factory=list)
    name = "knn"
    subject = "features"
    figures = TOP_FIGURES
    max_new_tokens = 1

    def after(self, folder: Path) -> Knn:
        """Return this benchmark with the run folder of ``before``."""
        return replace(self, votes=replace(self.votes, bank=folder))

    @cached_property
    def samples(self) -> list[QuerySample]:
        """One sample per test picture."""
        return [
            QuerySample(p.id, (p.path,), "", truth=self._classes[p.labels[0]], group=p.id, votes=self.votes)
            for p in self.pictures
        ]

    @property
    def _classes(self) -> tuple[str, ...]:
        return self.votes.classes.names

    @cached_property
    def _truth(self) -> dict[str, str]:
        return {p.id: self._classes[p.labels[0]] for p in self.pictures}

    @property
    def protocol(self) -> dict[str, Any]:
        """Neighbours, temperature, training pictures."""
        return dict(self.settings)

    def parse(self, row: Row) -> Verdict:
        """Look for the right class at the top of the vote, for every k; "top1" and "top5" are those of the chosen k."""
        right = [self._truth[row["id"]]]
        votes: Mapping[str, Sequence[str]] = row.get("votes") or {str(self.votes.k): [row["text"]]}
        each = {k: top_verdict(top[0] if top else "", top, right) for k, top in votes.items()}
        chosen = each[str(self.votes.k)]
        values = {f"{name}_k{k}": v.values[name] for k, v in each.items() for name in ("top1", "top5")}
        return Verdict(chosen.answer, chosen.score, {**chosen.values, **values})

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return top-1 and top-5 in percent, of the chosen k and of every other."""
        verdicts = {i: self.parse(row) for i, row in rows.items()}
        metrics = top_metrics(verdicts, {i: self._truth[i] for i in rows})
        for k in self.votes.ks:
            for name in (f"top1_k{k}", f"top5_k{k}"):
                values = [v.values[name] for v in verdicts.values() if name in v.values]
                if values:
                    metrics[name] = sum(values) / len(values)
        if self.votes.bank is not None and (self.votes.bank / RESULTS).is_file():
            metrics["n_train"] = read_json(self.votes.bank / RESULTS)["n"]
        return metrics


def load(
    path: Path,
    *,
    k: int = 20,
    ks: tuple[int, ...] = KS,
    temperature: float = 0.07,
    train: str = "train",
    test: str = "",
    bank: str = "",
    store: Store = "float32",
    control: Control = "none",
) -> Knn:
    """Read the pictures of a k-NN evaluation.

    Args:
        path: folder with train/<class>/* and test/<class>/* or val/<class>/*.
        k: neighbours of the figures that runs are compared by.
        ks: further numbers of neighbours; those beyond the number of training pictures are left out.
        temperature: of the weights.
        train: folder of the training pictures.
        test: folder of the test pictures; empty: test or val.
        bank: run folder of training features that are there already; empty: they are made first, in OUT/train.
        store: float32 keeps the features exactly, float16 takes half of the disk (a picture of 768 numbers: 4 or 2 KB).
        control: grey pictures or not.

    Raises:
        UsageError: no such folder, numbers out of range.
        AnnotationError: a layout that is another; what does not belong there becomes ``faults``.
    """
    if k < 1 or any(n < 1 for n in ks) or temperature <= 0:
        raise UsageError(f"k={k}, ks={ks}, temperature={temperature}: expected numbers greater than 0")
    if store not in ("float32", "float16"):
        raise UsageError(f"store={store!r}: expected float32 or float16")
    root, names = _train_classes(path, train)
    classes = ClassList(names)
    learned = read_custom(root, classes)
    if len(learned.pictures) < k:
        raise UsageError(f"k={k}, but {root} holds {len(learned.pictures)} pictures")
    chosen = tuple(sorted({k, *(n for n in ks if n <= len(learned.pictures))}))
    asked = read_custom(path / test if test else find_folder(path, ["test", "val"]), classes)
    settings = {
        "k": k,
        "ks": list(chosen),
        "temperature": temperature,
        "store": store,
        "classes": len(names),
        "class_list": classes.digest,
        "n_pictures": len(asked.pictures),
        "train": _digest(learned.pictures),
        "n_train": len(learned.pictures),
    }
    faults = [*(f"training: {fault}" for fault in learned.faults), *asked.faults]
    before = Bank(learned.pictures, store, {"store": store, "class_list": classes.digest}, control, learned.faults)
    labels = {p.id: p.labels[0] for p in learned.pictures}
    votes = Votes(Path(bank) if bank else None, labels, classes, k, chosen, temperature)
    return Knn(asked.pictures, votes, before, settings, control, faults)


def suspicions(task: Knn) -> list[str]:
    """Return classes that are not in both parts."""
    shown = {p.labels[0] for p in task.pictures}
    missing = [name for i, name in enumerate(task.votes.classes.names) if i not in shown]
    found = [f"{len(missing)} classes have no test picture, first {', '.join(missing[:5])}"] if missing else []
    left = sorted(set(KS) - set(task.votes.ks)) if len(task.votes.labels) < max(KS) else []
    return [*found, *([f"{len(task.votes.labels)} training pictures: no vote of {left} neighbours"] if left else [])]


def _train_classes(path: Path, train: str) -> tuple[Path, tuple[str, ...]]:
    root = path / train
    if not root.is_dir():
        raise AnnotationError(f"{path} holds no folder {train} of training pictures; name another by train=")
    return root, tuple(sorted(f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")))


def _digest(pictures: Sequence[Labelled]) -> str:
    return hashlib.sha256(json.dumps([p.id for p in pictures]).encode()).hexdigest()[:16]
