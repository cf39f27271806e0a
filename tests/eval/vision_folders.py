"""Tiny folders in the official layouts of COCO, Karpathy's splits and ADE20K."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (48, 32)
"""Width and height of every picture."""


def draw(path: Path, seed: int, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    path.with_suffix(".png").rename(path)  # the content is what counts, and PNG loses nothing
    return path


def dump(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def edit(path: Path, change: Any) -> None:
    """Load a JSON file, change it in place, save it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    dump(path, data)


def box_polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def coco(root: Path, pictures: int = 4) -> Path:
    """annotations/instances_val2017.json and val2017/: a person and a car each, a crowd in the first picture."""
    annotations: list[dict[str, Any]] = []

    def add(image: int, category: int, box: tuple[float, float, float, float], crowd: bool = False) -> None:
        mask: Any = box_polygon(*box)
        if crowd:
            dense = np.zeros((SIZE[1], SIZE[0]), np.uint8)
            dense[int(box[1]) : int(box[1] + box[3]), int(box[0]) : int(box[0] + box[2])] = 1
            flat = dense.T.ravel()
            edges = np.flatnonzero(np.diff(flat)) + 1
            runs = np.diff([0, *edges, flat.size]).tolist()
            mask = {"size": [SIZE[1], SIZE[0]], "counts": runs if flat[0] == 0 else [0, *runs]}
        row = {"image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3]}
        annotations.append({"id": len(annotations) + 1, **row, "iscrowd": int(crowd), "segmentation": mask})

    for number in range(pictures):
        draw(root / "val2017" / f"{number:012d}.jpg", number)
        add(number, 1, (2 + number, 3, 10, 12))
        add(number, 3, (20, 8 + number, 20, 14))
    add(0, 1, (30, 1, 16, 6), crowd=True)
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": SIZE[0], "height": SIZE[1]} for n in range(pictures)]
    categories = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]
    dump(
        root / "annotations" / "instances_val2017.json",
        {"images": images, "annotations": annotations, "categories": categories},
    )
    return root


def karpathy(root: Path, name: str = "dataset_flickr30k.json", pictures: int = 3) -> Path:
    rows = []
    for number in range(pictures + 1):
        draw(root / "images" / f"{number}.jpg", number)
        sentences = [{"raw": f"Picture {number}, sentence {i}."} for i in range(6)]
        split = "test" if number < pictures else "train"
        rows.append({"imgid": number, "filename": f"{number}.jpg", "split": split, "sentences": sentences})
    dump(root / name, {"images": rows})
    return root


def ade20k(root: Path, pictures: int = 3) -> Path:
    """Labels 0 (no class) to 150 in 4 x 4 blocks."""
    for number in range(pictures):
        stem = f"ADE_val_{number + 1:08d}"
        draw(root / "images" / "validation" / f"{stem}.jpg", number)
        save_map(root / "annotations" / "validation" / f"{stem}.png", labels(number))
    names = [f"{i + 1}\t0.1\t1\t1\t0\tthing {i}, item {i}" for i in range(150)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *names]))
    return root


def labels(number: int) -> np.ndarray:
    """Return a picture's labels as they are stored."""
    small = np.random.default_rng(number).choice([0, 1, 2, 7, 150], (SIZE[1] // 4, SIZE[0] // 4))
    small[0, 0] = 150
    return small.repeat(4, 0).repeat(4, 1)


def save_map(path: Path, classes: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(classes.astype(np.uint8)).save(path)
    return path
