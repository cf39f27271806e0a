"""ImageNet-1k and its variants V2, ReaL, A, R, Sketch: top-1 and top-5 of a classifier.

Protocol: class index = rank of the synset id among the 1000 sorted ones; for A and R the logits of the other 800
classes are left out before the best is chosen. Sources: see ``imagenet_variants``; reference figures: timm's results.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Verdict
from vislm.eval.vision.class_lists import ClassList, ClassSample, read_classes
from vislm.eval.vision.image_folder import Labelled
from vislm.eval.vision.imagenet_variants import VARIANTS, read_custom, read_variant

TOP_FIGURES = (Figure("top1", columns=("top1",)), Figure("top5", columns=("top5",)))
"""Percent of the pictures."""


@dataclass(frozen=True)
class ImageNet(Benchmark):
    """Pictures to be classified; an answer is right or wrong."""

    pictures: Sequence[Labelled]
    classes: ClassList
    settings: Mapping[str, Any]
    control: Control = "none"
    faults: Sequence[str] = field(default_factory=list)
    templates: str = ""
    name: str = "imagenet"
    subject: str = "classifier"
    figures = TOP_FIGURES
    max_new_tokens = 1

    @cached_property
    def samples(self) -> list[ClassSample]:
        """One sample per picture."""
        return [
            ClassSample(
                p.id,
                (p.path,),
                "",
                truth=self._names(p),
                group=p.id,
                classes=self.classes,
                templates=self.templates,
            )
            for p in self.pictures
        ]

    @cached_property
    def _truth(self) -> dict[str, list[str]]:
        return {p.id: self._names(p) for p in self.pictures}

    def _names(self, picture: Labelled) -> list[str]:
        return [self.classes.names[label] for label in picture.labels]

    @property
    def protocol(self) -> dict[str, Any]:
        """Variant, classes, origin of the labels."""
        return {
            **self.settings,
            "classes": len(self.classes.possible),
            "class_list": self.classes.digest,
            "n_pictures": len(self.pictures),
        }

    def parse(self, row: Row) -> Verdict:
        """Look for a right class at the top, and among the first five."""
        return top_verdict(row["text"], row.get("top") or [row["text"]], self._truth[row["id"]])

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return top-1 and top-5 in percent of the pictures, and the mean over classes of top-1."""
        return top_metrics({i: self.parse(row) for i, row in rows.items()}, {i: self._truth[i][0] for i in rows})


def top_verdict(answer: str, top: Sequence[str], right: Sequence[str]) -> Verdict:
    """Judge an answer and the five likeliest classes, best first."""
    first, five = answer in right, any(name in right for name in top[:5])
    return Verdict(answer or None, float(first), {"top1": 100.0 * first, "top5": 100.0 * five})


def top_metrics(verdicts: Mapping[str, Verdict], classes: Mapping[str, str]) -> dict[str, Any]:
    """Return top1 and top5 in percent, mean_per_class (recall, for the first right class) and n."""
    if not verdicts:
        return {"top1": 0.0, "top5": 0.0, "mean_per_class": 0.0, "n": 0, "warnings": ["top1 has no denominator"]}
    per_class: dict[str, list[float]] = defaultdict(list)
    for i, verdict in verdicts.items():
        per_class[classes[i]].append(verdict.values["top1"])
    means = [sum(values) / len(values) for values in per_class.values()]
    figures = {key: sum(v.values[key] for v in verdicts.values()) / len(verdicts) for key in ("top1", "top5")}
    return {**figures, "mean_per_class": sum(means) / len(means), "n": len(verdicts)}


def load(path: Path, *, variant: str = "val", classes: str = "", control: Control = "none") -> ImageNet:
    """Read ImageNet's validation pictures or a variant of them, or class folders of your own.

    Args:
        path: folder with val/<synset>/*.JPEG; or with flat val/*.JPEG and one of ``ground_truth.FILES``; for variants
            their official folder or the one around it.
        variant: val, v2, real, a, r or sketch.
        classes: a file with one class folder a line, in the order of the model's outputs, for data that is not
            ImageNet; see ``class_lists.read_classes``. The folders may lie in ``path``/val, too.
        control: grey pictures or not.

    Raises:
        UnknownName: no such variant.
        AnnotationError: a layout that is none of the official ones; what does not belong there becomes ``faults``.
    """
    if classes:
        chosen = read_classes(classes, path)
        found = read_custom(path, chosen, next((n for n in ("val", "test") if (path / n).is_dir()), ""))
        return ImageNet(found.pictures, chosen, {"variant": "custom", "labels": found.labels}, control, found.faults)
    found = read_variant(path, variant)
    return ImageNet(found.pictures, found.classes, {"variant": variant, "labels": found.labels}, control, found.faults)


def suspicions(task: ImageNet) -> list[str]:
    """Return what is not as published: the number of pictures, of classes, of pictures per class."""
    if task.settings["variant"] not in VARIANTS:
        return []
    variant = VARIANTS[task.settings["variant"]]
    found: list[str] = []
    if len(task.pictures) != variant.pictures:
        found.append(f"{len(task.pictures)} pictures to score; officially {variant.pictures}")
    counts = Counter(p.labels[0] for p in task.pictures)
    missing = [i for i in task.classes.possible if i not in counts]
    if missing and task.settings["variant"] != "real":  # ReaL's first labels need not cover all classes
        names = ", ".join(task.classes.names[i] for i in missing[:5])
        found.append(f"{len(missing)} of {len(task.classes.possible)} classes have no picture, first {names}")
    if variant.per_class is not None:
        odd = [task.classes.names[i] for i, n in sorted(counts.items()) if n != variant.per_class]
        if odd:
            found.append(f"{len(odd)} classes do not have {variant.per_class} pictures, first {', '.join(odd[:5])}")
    return found
