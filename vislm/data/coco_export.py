"""Writing scenes as a folder of PNG images with COCO instance and caption annotations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vislm.data.scene_categories import CATEGORIES, THEMES
from vislm.data.scene_types import IMAGE_SIZE, Instance, Scene
from vislm.data.turns import caption
from vislm.files import atomic_write

GENERATOR = "vislm scenes"
"""Value of ``info.generator`` by which a reader recognises a folder of scenes."""


def write_coco(out: Path, scenes: Iterable[Scene], info: Mapping[str, Any]) -> Path:
    """Write ``images/*.png``, ``instances.json`` and ``captions.json`` to ``out`` and return it.

    Images are numbered from 1 (``id`` and file name), categories 1..16 in index order; boxes, areas and contrast are
    rounded to 1/100. The caption is spelt as the model is trained to say it.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    (out / "images").mkdir(parents=True, exist_ok=True)
    for image_id, scene in enumerate(scenes, start=1):
        name = f"{image_id:06d}.png"
        scene.image.save(out / "images" / name)
        size = {"width": IMAGE_SIZE, "height": IMAGE_SIZE}
        images.append({"id": image_id, "file_name": name, **size, "theme": scene.theme})
        for instance in scene.instances:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **_annotation(instance)})
        captions.append({"id": image_id, "image_id": image_id, "caption": caption(scene)})
    head = {"info": {"generator": GENERATOR, "description": "procedural scenes", **info}, "images": images}
    _write_json(out / "captions.json", {**head, "annotations": captions})
    _write_json(out / "instances.json", {**head, "annotations": annotations, "categories": _categories()})
    return out


def _annotation(instance: Instance) -> dict[str, Any]:
    box = [round(value, 2) for value in instance.bbox]
    return {
        "category_id": CATEGORIES.index(instance.category) + 1,
        "bbox": box,
        "area": round(box[2] * box[3], 2),
        "iscrowd": 0,
        "colour": instance.colour,
        "contrast": round(instance.contrast, 2),
        "occluded": instance.occluded,
    }


def _categories() -> list[dict[str, Any]]:
    themes = {name: theme for theme, (_, members) in THEMES.items() for name in members}
    return [
        {"id": number, "name": name, "supercategory": themes.get(name, "universal")}
        for number, name in enumerate(CATEGORIES, start=1)
    ]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as handle:
        json.dump(content, handle, indent=1)
