"""Tiny folders of the vision benchmarks whose annotations are files: what the trial of mutated annotations damages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

SIDE = 24


def _picture(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), (shade, 90, 40)).save(path, "PNG")
    return path


def classes_of_imagenet(root: Path) -> None:
    from vislm.eval.vision.class_lists import imagenet_classes

    wnids = imagenet_classes().names
    lines = ["ImageId,PredictionString"]
    for n in range(4):
        name = f"ILSVRC2012_val_{n + 1:08d}"
        _picture(root / "val" / f"{name}.JPEG", 50 * n)
        lines.append(f"{name},{wnids[7 * n]} 1 2 3 4")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines))


def classes_of_your_own(root: Path) -> None:
    names = ["red", "green", "blue"]
    for n, name in enumerate(names):
        _picture(root / "val" / name / "0.png", 50 * n)
    (root / "classes.txt").write_text("\n".join(f"{name}\ta {name} thing" for name in names))
    (root / "templates.txt").write_text("a photo of {}.\na drawing of {}.")


def boxes_and_masks(root: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in range(3)]
    outline = [[2.0, 2.0, 9.0, 2.0, 9.0, 8.5, 2.0, 8.5]]
    runs = {"counts": [26, 5, 545], "size": [SIDE, SIDE]}
    boxes = [
        {
            "id": i + 1,
            "image_id": i % 3,
            "category_id": 1 + i % 2,
            "bbox": [2, 2, 7, 6.5],
            "area": 45.5,
            "iscrowd": int(i == 4),
            "segmentation": runs if i == 4 else outline,
        }
        for i in range(5)
    ]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    text = json.dumps({"images": images, "categories": categories, "annotations": boxes})
    (root / "instances.json").write_text(text)
    for i in range(3):
        _picture(root / "images" / f"{i}.png", 60 * i)


def label_maps(root: Path) -> None:
    for n in range(2):
        name = f"ADE_val_{n + 1:08d}"
        _picture(root / "images" / "validation" / f"{name}.jpg", 80 * n)
        labels = root / "annotations" / "validation" / f"{name}.png"
        labels.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((SIDE, SIDE)).point(lambda v: v % 151).save(labels)


VISION: list[tuple[str, Callable[[Path], Any], dict[str, Any]]] = [
    ("imagenet", classes_of_imagenet, {}),
    ("zero_shot", classes_of_your_own, {"classes": "classes.txt", "templates": "templates.txt"}),
    ("coco_detection", boxes_and_masks, {}),
    ("ade20k", label_maps, {}),
]
"""Benchmark, what writes its folder, options."""
