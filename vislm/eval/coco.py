"""Reading COCO-format annotations with every reference checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from vislm.errors import AnnotationError


@dataclass
class CocoFolder:
    """A folder with instances.json, images/ and, if present, captions.json."""

    root: Path
    images: dict[int, str]
    """Image id -> file name below the image folder."""
    categories: dict[int, str]
    objects: dict[int, list[str]]
    """Image id -> category names, each once, in order of first appearance by annotation id."""
    captions: dict[int, list[str]] = field(default_factory=dict)
    themes: dict[int, str | None] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def is_scenes(self) -> bool:
        """Whether this package's generator made the folder."""
        return self.info.get("generator") == "vislm scenes"

    def path(self, image: int) -> Path:
        """Return where an image lies."""
        return self.root / "images" / self.images[image]


def read_coco_folder(root: Path) -> CocoFolder:
    """Read and check a folder in COCO's format.

    Raises:
        AnnotationError: files that are missing or broken, duplicate ids, references to nothing, boxes that are not
            finite and positive, file names that leave the image folder; the first five faults and their number.
    """
    data = _load(root / "instances.json")
    check = _Checker(root / "instances.json")
    images = check.table(data, "images", _image_fault)
    categories = check.table(data, "categories", lambda c: None if isinstance(c.get("name"), str) else "has no name")
    annotations = check.table(data, "annotations", _annotation_fault)
    for a in annotations.values():
        image, category = a.get("image_id"), a.get("category_id")
        check.expect(type(image) is int and image in images, f"annotation {a['id']} is about unknown image {image!r}")
        known = type(category) is int and category in categories
        check.expect(known, f"annotation {a['id']} has unknown category {category!r}")
    check.finish()
    names = {i: c["name"] for i, c in categories.items()}
    objects: dict[int, list[str]] = {i: [] for i in images}
    for _, a in sorted(annotations.items()):
        shown = objects[a["image_id"]]
        if names[a["category_id"]] not in shown:
            shown.append(names[a["category_id"]])
    info = data.get("info")
    files = {i: r["file_name"] for i, r in images.items()}
    folder = CocoFolder(root, files, names, objects)
    folder.info = info if isinstance(info, dict) else {}
    folder.themes = {i: r.get("theme") for i, r in images.items()}
    if (root / "captions.json").is_file():
        folder.captions = read_captions(root / "captions.json", set(images))
    return folder


def read_captions(path: Path, images: set[int] | None = None) -> dict[int, list[str]]:
    """Return image id -> captions from a COCO captions file; ids outside ``images`` are ignored."""
    data = _load(path)
    check = _Checker(path)
    rows = check.table(data, "annotations", _caption_fault)
    check.finish()
    captions: dict[int, list[str]] = {}
    for row in rows.values():
        if images is None or row["image_id"] in images:
            captions.setdefault(row["image_id"], []).append(row["caption"])
    return captions


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AnnotationError(f"{path} does not exist; a COCO-format folder holds instances.json and images/") from None
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


class _Checker:
    """Collects faults and raises once."""

    def __init__(self, path: Path) -> None:
        self.path, self.faults = path, []

    def expect(self, condition: bool, fault: str) -> None:
        if not condition:
            self.faults.append(fault)

    def table(
        self, data: dict[str, Any], key: str, fault_of: Callable[[dict[str, Any]], str | None]
    ) -> dict[int, dict[str, Any]]:
        rows = data.get(key)
        if not isinstance(rows, list):
            self.faults.append(f"{key!r} is {type(rows).__name__}, expected a list")
            return {}
        table: dict[int, dict[str, Any]] = {}
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or isinstance(row.get("id"), bool) or not isinstance(row.get("id"), int):
                self.faults.append(f"{key}[{number}] has no integer id")
                continue
            self.expect(row["id"] not in table, f"{key}[{number}]: id {row['id']} appears twice")
            fault = fault_of(row)
            self.expect(fault is None, f"{key} id {row['id']} {fault}")
            table[row["id"]] = row
        return table

    def finish(self) -> None:
        if self.faults:
            first = "; ".join(self.faults[:5])
            raise AnnotationError(f"{self.path}: {len(self.faults)} faults: {first}")
