"""Where the pictures of ImageNet's validation set and of its variants lie, and what of them is official.

Sources: Russakovsky et al. 2015 (arXiv 1409.0575); V2, Recht et al. 2019 (1902.10811), matched frequency; ReaL, Beyer
et al. 2020 (2006.07159); A, Hendrycks et al. 2021 (1907.07174); R, Hendrycks et al. 2021 (2006.16241); Sketch, Wang et
al. 2019 (1905.13549).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vislm.errors import UnknownName, UsageError
from vislm.eval.reading import Fault, find_folder, safe_path, shown, whole_of
from vislm.eval.vision.class_lists import ClassList, imagenet_classes, real_labels
from vislm.eval.vision.ground_truth import read_ground_truth
from vislm.eval.vision.image_folder import SUFFIXES, Labelled, read_folders


@dataclass(frozen=True)
class Variant:
    """One of the sets."""

    folders: tuple[str, ...]
    """Where its class folders may lie below the data folder, besides that folder itself."""
    pictures: int
    """That are scored, officially."""
    subset: str = ""
    """Of the classes, if not all 1000 are shown."""
    per_class: int | None = None
    """Pictures of each class, if all have as many."""


_VAL = ("val", "validation", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val")
VARIANTS = {
    "val": Variant(_VAL, 50_000, per_class=50),
    "real": Variant(_VAL, 46_837),
    "v2": Variant(("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency"), 10_000, per_class=10),
    "a": Variant(("imagenet-a",), 7_500, "a"),
    "r": Variant(("imagenet-r",), 30_000, "r"),
    "sketch": Variant(("sketch", "ImageNet-Sketch", "imagenet-sketch"), 50_889),
}
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})(?:_\w+)?\.\w+", re.ASCII)


@dataclass(frozen=True)
class Pictures:
    """What a data folder holds."""

    classes: ClassList
    pictures: list[Labelled]
    faults: list[str]
    labels: str = "folders"
    """Where the classes are from: folders, the name of a list, or ReaL's digest."""


def read_variant(path: Path, name: str) -> Pictures:
    """Read the pictures of a variant with their classes.

    Raises:
        UnknownName: no such variant.
        UsageError: no such folder.
        AnnotationError: a layout that is none of the official ones.
    """
    if name not in VARIANTS:
        raise UnknownName("variant of ImageNet", name, VARIANTS)
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder")
    variant, classes = VARIANTS[name], imagenet_classes(VARIANTS[name].subset)
    found = find_folder(path, variant.folders)
    folder = found if found.is_dir() else path
    faults: list[str] = []
    if name == "v2":
        return Pictures(classes, read_folders(folder, _number_of, faults), faults)
    if name in ("val", "real") and _is_flat(folder):
        pictures, labels = _flat(path, folder, classes, faults)
    else:
        pictures, labels = read_folders(folder, _place_in(classes), faults), "folders"
    if name == "real":
        return _reassessed(path, Pictures(classes, pictures, faults))
    return Pictures(classes, pictures, faults, labels)


def read_custom(path: Path, classes: ClassList, folder: str = "") -> Pictures:
    """Read class folders whose names ``classes`` lists, in the data folder or in a folder of it."""
    root = path / folder
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder")
    faults: list[str] = []
    return Pictures(classes, read_folders(root, _place_in(classes), faults), faults)


def _place_in(classes: ClassList) -> Callable[[str], int]:
    possible = frozenset(classes.possible)

    def place(name: str) -> int:
        if name not in classes.places:
            raise Fault(f"is none of the {len(classes.names)} classes")
        if classes.places[name] not in possible:
            raise Fault(f"is a class of ImageNet, but none of the {len(possible)} of this variant")
        return classes.places[name]

    return place


def _number_of(name: str) -> int:
    """Return the class of V2's folders, which are numbers: sorted as texts, 10 would come before 2."""
    if not name.isdecimal() or not name.isascii() or len(name) > 4 or int(name) > 999:
        raise Fault("is none of V2's folders 0 to 999")
    return int(name)


def _is_flat(folder: Path) -> bool:
    return any(p.name.startswith("ILSVRC2012_val_") and p.is_file() for p in folder.iterdir())


def _flat(root: Path, folder: Path, classes: ClassList, faults: list[str]) -> tuple[list[Labelled], str]:
    truth, source = read_ground_truth(root, classes.places, faults)
    present = {p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES}
    faults += [f"{folder / name}: {source} does not name it" for name in sorted(present - truth.keys())]
    pictures = []
    for name, label in truth.items():
        try:
            pictures.append(Labelled(name, safe_path(folder, name), (label,)))
        except Fault as fault:
            faults.append(f"{source}: {fault}")
    return sorted(pictures, key=lambda p: p.id), source


def _reassessed(root: Path, found: Pictures) -> Pictures:
    """Give the pictures ReaL's labels; those without any are left out, as they are officially."""
    labels, digest = real_labels(root)
    pictures: list[Labelled] = []
    for picture in found.pictures:
        try:
            match = _VAL_NUMBER.fullmatch(picture.path.name)
            if match is None or not 1 <= int(match[1]) <= len(labels):
                raise Fault("no validation picture's name (ILSVRC2012_val_00000001.JPEG ...), which ReaL goes by")
            new = labels[int(match[1]) - 1]
            if not isinstance(new, list):
                raise Fault(f"ReaL's entry {match[1]} is {shown(new)}; expected a list of classes")
            right = tuple(whole_of({"class": label}, "class", 0, 1000) for label in new)
        except Fault as fault:
            found.faults.append(f"{picture.id}: {fault}")
            continue
        if right:
            pictures.append(Labelled(picture.id, picture.path, right))
    return Pictures(found.classes, pictures, found.faults, digest)
