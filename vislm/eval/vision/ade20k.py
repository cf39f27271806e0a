"""ADE20K semantic segmentation: mean IoU over 150 classes.

Source: Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017; the SceneParsing challenge of 2016
(ADEChallengeData2016); mmsegmentation (the metric).

A row holds the predicted classes as a PNG ("map"), so that it can be scored again; its parsed answer is the picture's
confusion matrix, sparse: [class of the label, class of the prediction, pixels].
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vislm.errors import AnnotationError, ImageError, UsageError
from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict
from vislm.eval.vision import miou
from vislm.eval.vision.label_maps import picture_size, read_map, unpacked_map

CLASSES = 150
PUBLISHED = {"validation": 2000, "training": 20210}
"""Split -> pictures."""
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Labelled:
    """A picture with its labels."""

    id: str
    image: Path
    labels: Path
    digest: str
    """Of the labels' file."""


@dataclass(frozen=True)
class Ade20k(Benchmark):
    """Mean IoU, mean accuracy and pixel accuracy. One picture's score is the mean IoU of its own classes."""

    pictures: Sequence[Labelled]
    settings: Mapping[str, Any]
    class_names: Sequence[str] = ()
    control: Control = "none"
    faults: Sequence[str] = field(default_factory=list)
    name = "ade20k"
    subject = "segmenter"
    figures = (Figure("mIoU of a picture"), Figure("aAcc", "ratio", ("right", "pixels")))

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per picture."""
        return [Sample(p.id, (p.image,), "", {"labels": p.labels.name, "sha256": p.digest}) for p in self.pictures]

    @cached_property
    def _by_id(self) -> dict[str, Labelled]:
        return {p.id: p for p in self.pictures}

    @cached_property
    def _compared(self) -> dict[str, tuple[str, list[list[int]]]]:
        """Sample id -> its map and what came of it: a row is judged when it is made and when all are."""
        return {}

    @property
    def protocol(self) -> dict[str, Any]:
        """Split, classes, whether label 0 is left out, and how many pictures there are."""
        return {**self.settings, "n_images": len(self.pictures)}

    def parse(self, row: Row) -> Verdict:
        """Compare a map with the labels.

        Raises:
            AnnotationError: no map, or one of another size or with other classes.
        """
        sparse = self._confusion(row)
        matrix = miou.summed([sparse], self.settings["classes"])
        pixels, right = int(matrix.sum()), int(np.trace(matrix))
        score = miou.scores(matrix)["mIoU"] if pixels else None
        return Verdict(sparse, score, {"right": float(right), "pixels": float(pixels)})

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return aAcc, mIoU, mAcc, mDice of all pixels of the pictures that are there."""
        metrics: dict[str, Any] = {**miou.scores(self._summed(rows)), "n": len(rows)}
        return metrics if rows else {**metrics, "warnings": ["no pictures"]}

    def groups(self, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return IoU and accuracy for each class that occurs."""
        each = miou.per_class(self._summed(rows))
        names = self.class_names or [f"class {c}" for c in range(self.settings["classes"])]
        return {
            name: {key: values[c] for key, values in each.items() if key != "Dice" and values[c] == values[c]}
            for c, name in enumerate(names)
            if each["IoU"][c] == each["IoU"][c]  # not NaN
        }

    def _summed(self, rows: Rows) -> NDArray[np.int64]:
        return miou.summed((self._confusion(row) for row in rows.values()), self.settings["classes"])

    def _confusion(self, row: Row) -> list[list[int]]:
        text = row.get("map")
        known = self._compared.get(row["id"])
        if known is not None and known[0] == text:
            return known[1]
        where, picture = f"row {row['id']}", self._by_id[row["id"]]
        try:
            predicted = unpacked_map(text, where)
            labels = _labels(picture.labels, self.settings["classes"], self.settings["reduce_zero_label"])
            found = miou.sparse(miou.confusion(labels, predicted, self.settings["classes"]))
        except (ImageError, UsageError) as error:
            raise AnnotationError(f"{where}: {error}") from error
        self._compared[row["id"]] = (str(text), found)
        return found


def load(
    path: Path,
    *,
    split: str = "validation",
    classes: int = CLASSES,
    reduce_zero_label: bool = True,
    control: Control = "none",
) -> Ade20k:
    """Read ADE20K as the SceneParsing challenge ships it; every label is decoded and checked.

    Args:
        path: ADEChallengeData2016, with images/validation/*.jpg, annotations/validation/*.png and objectInfo150.txt
            (the classes' names; may be missing), or a folder that holds it.
        split: validation or training, or another folder's name.
        classes: how many there are.
        reduce_zero_label: label 0 is no class: it does not count, and label k is class k - 1.
        control: grey pictures or not.

    Raises:
        UsageError: the path is no folder, or a number of classes that a map cannot hold.
        AnnotationError: no pictures or labels; pictures without sound labels become ``faults`` instead.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder")
    if not 1 <= classes < miou.IGNORED:
        raise UsageError(f"classes={classes}: expected 1 to {miou.IGNORED - 1}")
    root = path / "ADEChallengeData2016" if (path / "ADEChallengeData2016").is_dir() else path
    images, labels = root / "images" / split, root / "annotations" / split
    for folder in (images, labels):
        if not folder.is_dir():
            raise AnnotationError(f"{root} holds no folder {folder.relative_to(root)}")
    faults: list[str] = []
    pictures = _pairs(images, labels, faults)
    sound = []
    for key, image, file in pictures:
        fault = _fault(image, file, classes, reduce_zero_label)
        if fault:
            faults.append(f"sample {key}: {fault}")
        else:
            sound.append(Labelled(key, image, file, hashlib.sha256(file.read_bytes()).hexdigest()[:16]))
    settings = {"split": split, "classes": classes, "reduce_zero_label": reduce_zero_label}
    return Ade20k(sound, settings, _class_names(root, classes), control, faults)


def suspicions(benchmark: Benchmark) -> list[str]:
    """Return what is not as published: another number of pictures, no names of classes."""
    if not isinstance(benchmark, Ade20k):
        raise UsageError(f"{benchmark.name} is not ade20k")
    found, published = [], PUBLISHED.get(benchmark.settings["split"])
    if published and len(benchmark.pictures) != published:
        found.append(f"{len(benchmark.pictures)} pictures; the published {benchmark.settings['split']} has {published}")
    if not benchmark.class_names:
        found.append(f"no objectInfo150.txt with {benchmark.settings['classes']} names: classes are shown by number")
    if benchmark.settings["reduce_zero_label"] and benchmark.pictures:
        largest = max(int(read_map(p.labels).max()) for p in benchmark.pictures)
        if largest < benchmark.settings["classes"]:
            found.append(f"the largest label is {largest}, not {benchmark.settings['classes']}: is label 0 a class?")
    return found


def _pairs(images: Path, labels: Path, faults: list[str]) -> list[tuple[str, Path, Path]]:
    """Return id, picture and labels in the order of the ids; what has no partner or two is a fault."""
    maps = {p.stem: p for p in labels.iterdir() if p.suffix.lower() == ".png"}
    found: dict[str, Path] = {}
    for image in sorted(p for p in images.iterdir() if p.suffix.lower() in _SUFFIXES):
        if image.stem in found:
            faults.append(f"sample {image.stem}: {image.name} and {found[image.stem].name} share their labels")
        elif image.stem not in maps:
            faults.append(f"sample {image.stem}: {image.name} has no labels {labels / image.stem}.png")
        else:
            found[image.stem] = image
    alone = sorted(maps.keys() - found.keys())
    faults += [f"sample {stem}: the labels {maps[stem].name} have no picture" for stem in alone]
    if not maps and not found:
        raise AnnotationError(f"{images} and {labels} hold no pictures with labels")
    return [(stem, image, maps[stem]) for stem, image in found.items()]


def _fault(image: Path, labels: Path, classes: int, reduce_zero_label: bool) -> str | None:
    try:
        found = _labels(labels, classes, reduce_zero_label)
    except ImageError as error:
        return str(error)
    size = picture_size(image)
    if size is not None and found.shape != size[::-1]:
        return f"the picture has {size[0]} x {size[1]} pixels, its labels {found.shape[1]} x {found.shape[0]}"
    return None


def _labels(path: Path, classes: int, reduce_zero_label: bool) -> NDArray[np.int64]:
    """Return classes (H, W) from 0, 255 where a pixel does not count."""
    labels = read_map(path)
    if reduce_zero_label:
        labels = miou.without_zero(labels)
    wrong = labels[(labels != miou.IGNORED) & (labels >= classes)]
    if wrong.size:
        shift = int(reduce_zero_label)
        raise ImageError(path, f"holds the label {wrong[0] + shift}; expected {shift} to {classes - 1 + shift}")
    return labels


def _class_names(root: Path, classes: int) -> list[str]:
    """Return the names in objectInfo150.txt, a table by tabs whose last column lists synonyms; the first, if unique."""
    path = root / "objectInfo150.txt"
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"cannot read {path}: {error}") from error
    synonyms = [line.split("\t")[-1].strip() for line in lines if line.strip()]
    first = [re.split("[,;]", text)[0].strip() for text in synonyms]
    names = [one if first.count(one) == 1 else text for one, text in zip(first, synonyms, strict=True)]
    return names if len(set(names)) == len(names) == classes else []
