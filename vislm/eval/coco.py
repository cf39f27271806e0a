"""Reading COCO-format annotations with every reference checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from vislm.errors import AnnotationError

VAL2014 = "val2014"
_LISTED = 5
"""Faults that a message names."""


@dataclass
class CocoFolder:
    """Pictures with objects and, if present, people's captions."""

    root: Path
    images: dict[int, str]
    """Image id -> file name below the image folder."""
    categories: dict[int, str]
    objects: dict[int, list[str]]
    """Image id -> category names, each once, in order of first appearance by annotation id."""
    captions: dict[int, list[str]] = field(default_factory=dict)
    themes: dict[int, str | None] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    image_folder: str = "images"

    @property
    def is_scenes(self) -> bool:
        """Whether this package's generator made the folder."""
        return self.info.get("generator") == "vislm scenes"

    def path(self, image: int) -> Path:
        """Return where an image lies."""
        return self.root / self.image_folder / self.images[image]


def read_coco_folder(root: Path, coco: str = VAL2014, faults: list[str] | None = None) -> CocoFolder:
    """Read and check a folder in COCO's format.

    Args:
        root: holds instances.json, perhaps captions.json, and images/; or, in the official layout,
            annotations/instances_val2014.json, perhaps annotations/captions_val2014.json, and val2014/.
        coco: the part of the data set in the official layout.
        faults: grows by one line per broken row and per image left out; None: broken rows are an error. An image is
            left out as a whole if anything about it is broken, as its objects are then not known.

    Raises:
        AnnotationError: files that are missing or no JSON; and without ``faults``: duplicate ids, references to
            nothing, boxes that are not finite and positive, file names that leave the image folder; the first five
            faults and their number.
    """
    file, captions_file, image_folder = _layout(root, coco)
    data = _load(file)
    check = _Checker(file)
    images = check.table(data, "images", _image_fault)
    categories = check.table(data, "categories", lambda c: None if isinstance(c.get("name"), str) else "has no name")
    annotations = check.table(data, "annotations", _annotation_fault)
    check.references(annotations, images, categories)
    captions = _captions(captions_file, faults, check) if captions_file.is_file() else {}
    left_out = check.left_out & images.keys()
    check.finish(faults, [f"image {i} ({images[i]['file_name']}) is left out" for i in sorted(left_out)])
    kept = {i: row for i, row in images.items() if i not in left_out}
    objects: dict[int, list[str]] = {i: [] for i in kept}
    for _, a in sorted(annotations.items()):
        name = categories[a["category_id"]]["name"]
        if a["image_id"] in kept and name not in objects[a["image_id"]]:
            objects[a["image_id"]].append(name)
    info = data.get("info")
    return CocoFolder(
        root,
        {i: row["file_name"] for i, row in kept.items()},
        {i: c["name"] for i, c in categories.items()},
        objects,
        {i: texts for i, texts in captions.items() if i in kept},
        {i: row.get("theme") for i, row in kept.items()},
        info if isinstance(info, dict) else {},
        image_folder,
    )


def _layout(root: Path, coco: str) -> tuple[Path, Path, str]:
    """Return the files of instances and captions, and the name of the image folder."""
    plain, official = root / "instances.json", root / "annotations" / f"instances_{coco}.json"
    if official.is_file() and not plain.is_file():
        return official, official.with_name(f"captions_{coco}.json"), coco
    return plain, root / "captions.json", "images"


def has_coco_folder(root: Path, coco: str = VAL2014) -> bool:
    """Return whether :func:`read_coco_folder` would find instances here."""
    return _layout(root, coco)[0].is_file()


def read_captions(path: Path, images: set[int] | None = None) -> dict[int, list[str]]:
    """Return image id -> captions from a COCO captions file; ids outside ``images`` are ignored.

    Raises:
        AnnotationError: not JSON, or broken rows, the first five of which are named.
    """
    check = _Checker(path)
    captions = _captions(path, None, check)
    return {i: texts for i, texts in captions.items() if images is None or i in images}


def _captions(path: Path, faults: list[str] | None, whole: _Checker) -> dict[int, list[str]]:
    check = _Checker(path)
    rows = check.table(_load(path), "annotations", _caption_fault)
    check.finish(faults)
    whole.left_out |= check.left_out
    captions: dict[int, list[str]] = {}
    for row in rows.values():
        captions.setdefault(row["image_id"], []).append(row["caption"])
    return captions


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AnnotationError(
            f"{path} does not exist; a COCO-format folder holds instances.json and images/, or "
            "annotations/instances_val2014.json and val2014/"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AnnotationError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise AnnotationError(
            f"{path} holds a {type(data).__name__}; a COCO file is an object with images, annotations"
        )
    return data


def is_safe_name(name: str) -> bool:
    """Return whether a file name of an annotation file names something below the folder that it is joined to."""
    path = PureWindowsPath(name)  # splits at both kinds of slash and knows drives
    return bool(path.parts) and not path.anchor and ".." not in path.parts and "\0" not in name


def _image_fault(image: dict[str, Any]) -> str | None:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        return "has no file_name"
    return None if is_safe_name(name) else f"has a file_name that leaves the image folder: {name!r}"


def _caption_fault(caption: dict[str, Any]) -> str | None:
    if not isinstance(caption.get("caption"), str):
        return "has no caption"
    return None if type(caption.get("image_id")) is int else f"has image_id {caption.get('image_id')!r}"


def _annotation_fault(annotation: dict[str, Any]) -> str | None:
    box = annotation.get("bbox")
    if box is None:
        return "has no bbox"
    numbers = isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)
    if not numbers or not all(abs(v) < _HUGE for v in box):
        return f"has bbox {box!r}; expected four finite numbers x, y, width, height"
    return f"has an empty bbox {box!r}" if box[2] <= 0 or box[3] <= 0 else None


_HUGE = 1e9  # also false for infinity and NaN; an integer may be too long for a float
Table = dict[int, dict[str, Any]]
"""Id -> row."""


class _Checker:
    """Collects the faults of one file, and the images that they concern."""

    def __init__(self, path: Path) -> None:
        self.path, self.faults, self.left_out = path, list[str](), set[int]()
        self._unfit = dict[str, set[int]]()

    def table(self, data: dict[str, Any], key: str, fault_of: Callable[[dict[str, Any]], str | None]) -> Table:
        """Return the sound rows of a list by id; an id that appears twice stands for neither row."""
        rows, unfit = data.get(key), self._unfit.setdefault(key, set())
        if not isinstance(rows, list):
            self.faults.append(f"{key!r} is {type(rows).__name__}, expected a list")
            return {}
        table: Table = {}
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or isinstance(row.get("id"), bool) or not isinstance(row.get("id"), int):
                self._bad(row, f"{key}[{number}] has no integer id")
                continue
            if row["id"] in table:
                self._bad(row, f"{key}[{number}]: id {row['id']} appears twice")
                self._bad(table[row["id"]])
                unfit.add(row["id"])
            fault = fault_of(row)
            if fault is not None:
                self._bad(row, f"{key} id {row['id']} {fault}")
                unfit.add(row["id"])
            table[row["id"]] = row
        return {i: row for i, row in table.items() if i not in unfit}

    def references(self, annotations: Table, images: Table, categories: Table) -> None:
        """Remove annotations that refer to nothing; what they refer to may be there, but broken."""
        for a in list(annotations.values()):
            image, category = a.get("image_id"), a.get("category_id")
            if type(image) is int and image in images and type(category) is int and category in categories:
                continue
            del annotations[a["id"]]
            if type(image) is not int or not (image in images or image in self._unfit["images"]):
                self._bad(a, f"annotation {a['id']} is about unknown image {image!r}")
            elif type(category) is not int or not (category in categories or category in self._unfit["categories"]):
                self._bad(a, f"annotation {a['id']} has unknown category {category!r}")
            else:
                self._bad(a)

    def _bad(self, row: Any, fault: str = "") -> None:
        if fault:
            self.faults.append(fault)
        if isinstance(row, dict) and type(row.get("image_id")) is int:
            self.left_out.add(row["image_id"])

    def finish(self, faults: list[str] | None, consequences: Sequence[str] = ()) -> None:
        """Hand the faults over; without a list for them, they are an error."""
        if faults is not None:
            faults += [f"{self.path.name}: {fault}" for fault in (*self.faults, *consequences)]
        elif self.faults:
            first = "; ".join(self.faults[:_LISTED])
            raise AnnotationError(f"{self.path}: {len(self.faults)} faults: {first}")
