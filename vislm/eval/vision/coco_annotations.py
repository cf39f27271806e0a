"""COCO's instances file, row by row: what a scorer of boxes and masks must be able to rely on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError
from vislm.eval.reading import (
    Fault,
    Once,
    build_rows,
    find_file,
    find_folder,
    read_json,
    rows_of,
    safe_path,
    shown,
    text_of,
    whole_of,
)
from vislm.eval.vision.run_lengths import mask_fault
from vislm.images import MAX_SIDE

COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""The 80 ids that COCO's categories have among 1 to 90; label k of a model of 80 classes is the k-th of them."""


@dataclass(frozen=True)
class CocoImage:
    """One picture."""

    id: int
    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class Instances:
    """An instances file without its broken rows."""

    file: Path
    images: Sequence[CocoImage]
    categories: Mapping[int, str]
    annotations: Sequence[Mapping[str, Any]]
    """COCO's own rows, checked."""

    def scored(self) -> dict[str, Any]:
        """Return the file's content as the scorers take it."""
        return {
            "images": [{"id": i.id, "width": i.width, "height": i.height} for i in self.images],
            "categories": [{"id": c, "name": name} for c, name in self.categories.items()],
            # numbered anew: the scorers take the id 0 for "no match"
            "annotations": [{**row, "id": number} for number, row in enumerate(self.annotations, start=1)],
        }


_HUGE = 1e9  # also false for infinity and NaN


def read_instances(root: Path, split: str, faults: list[str]) -> Instances:
    """Read a folder in COCO's layout (annotations/instances_val2017.json, val2017/), or instances.json and images/.

    Args:
        root: the folder.
        split: val2017, ...; "auto": instances.json, or the only instances file.
        faults: grows by one line per row that cannot be used; annotations of a picture that is left out go with it.

    Raises:
        AnnotationError: a file that is missing, ambiguous, no JSON, or without images, categories or annotations.
    """
    file = find_file(root, _names(root, split), "instances")
    folder = find_folder(root, [file.name.removeprefix("instances_").partition(".")[0], "images"])
    data = read_json(file, dict)
    tables = {key: rows_of(file, data, key) for key in ("images", "categories", "annotations")}
    once, named = Once("image id"), Once("file_name")

    def image(row: dict[str, Any]) -> CocoImage:
        name, number = text_of(row, "file_name"), whole_of(row, "id")
        size = whole_of(row, "width", 1, MAX_SIDE + 1), whole_of(row, "height", 1, MAX_SIDE + 1)
        path = safe_path(folder, name)
        once(str(number))
        named(name)
        return CocoImage(number, path, *size)

    images = build_rows(file, tables["images"], image, faults, id_key="id")
    categories = dict(build_rows(file, tables["categories"], _Category(), faults, id_key="id"))
    check = _Annotation({i.id: i for i in images}, categories)
    annotations = build_rows(file, tables["annotations"], check, faults, id_key="id")
    return Instances(file, images, categories, annotations)


def _names(root: Path, split: str) -> list[str]:
    if split != "auto":
        return [f"annotations/instances_{split}.json", f"instances_{split}.json"]
    official = sorted((root / "annotations").glob("instances_*.json"))
    if len(official) > 1:
        found = ", ".join(f.name for f in official)
        raise AnnotationError(f"{root} holds several instances files ({found}); choose one by its split, e.g. val2017")
    return [f"annotations/{official[0].name}"] if official else ["instances.json"]


class _Category:
    def __init__(self) -> None:
        self._id, self._name = Once("category id"), Once("category")

    def __call__(self, row: dict[str, Any]) -> tuple[int, str]:
        number, name = whole_of(row, "id"), text_of(row, "name")
        self._id(str(number))
        self._name(name)
        return number, name


class _Annotation:
    """Checks one annotation and gives it back."""

    def __init__(self, images: Mapping[int, CocoImage], categories: Mapping[int, str]) -> None:
        self._images, self._categories, self._once = images, categories, Once("annotation id")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = whole_of(row, "id")
        for key, known, what in (
            ("image_id", self._images, "image"),
            ("category_id", self._categories, "category"),
        ):
            if whole_of(row, key) not in known:
                raise Fault(f"has the unknown {what} {row[key]}")
        image = self._images[row["image_id"]]
        box: Any = row.get("bbox")
        if not _numbers(box, 4) or box[2] <= 0 or box[3] <= 0:
            raise Fault(f"bbox is {shown(box)}; expected x, y, width, height, finite and with an area")
        if box[0] >= image.width or box[1] >= image.height or box[0] + box[2] <= 0 or box[1] + box[3] <= 0:
            raise Fault(f"bbox {shown(box)} lies outside the picture of {image.width} x {image.height} pixels")
        if not _numbers([row.get("area")], 1) or row["area"] < 0:
            raise Fault(f"area is {shown(row.get('area'))}; expected a number of pixels")
        if type(row.get("iscrowd")) is not int or row["iscrowd"] not in (0, 1):
            raise Fault(f"iscrowd is {shown(row.get('iscrowd'))}; expected 0 or 1")
        if "segmentation" in row:
            _check_mask(row["segmentation"], image)
        self._once(str(number))
        return row


def _numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(v) in (int, float) and abs(v) < _HUGE for v in values)
    )


def _check_mask(mask: Any, image: CocoImage) -> None:
    if isinstance(mask, list):
        if not mask or not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in mask):
            raise Fault(f"segmentation is {shown(mask)}; expected polygons of at least three points each")
        for polygon in mask:
            _check_polygon(polygon, image)
    elif fault := mask_fault(mask, image.width, image.height):
        raise Fault(f"segmentation {fault}")


def _check_polygon(polygon: list[Any], image: CocoImage) -> None:
    """Refuse points far outside the picture: the scorers walk along the edges, pixel by pixel."""
    inside = _numbers(polygon, len(polygon)) and all(
        -side <= v <= 2 * side
        for values, side in ((polygon[::2], image.width), (polygon[1::2], image.height))
        for v in values
    )
    if not inside:
        raise Fault(f"segmentation has the polygon {shown(polygon)}; expected points in or close to the picture")
