"""How well one picture's boxes were found: a figure that two detectors can be compared by, picture by picture.

Average precision belongs to a whole data set; this is what can be paired and resampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CONFIDENT = 0.5
"""Detections with a lower score are not looked at."""
OVERLAP = 0.5
"""Intersection over union from which a box counts as found."""


def picture_f1(objects: Sequence[Mapping[str, Any]], detections: Sequence[Mapping[str, Any]]) -> float:
    """Return the F1 of boxes: 2 matches / (objects + confident detections); 1.0 where there is neither.

    Detections, the most confident first, take the object of their category that they overlap most and that is left;
    detections mostly inside a crowd of their category do not count, nor do crowds.

    Args:
        objects: "category_id", "bbox" (x, y, width, height), "iscrowd".
        detections: "category_id", "bbox", "score".
    """
    left = [o for o in objects if not o["iscrowd"]]
    crowds, wanted = [o for o in objects if o["iscrowd"]], len(left)
    confident = sorted((d for d in detections if d["score"] >= CONFIDENT), key=lambda d: -d["score"])
    matches = counted = 0
    for found in confident:
        overlaps = [overlap(found["bbox"], o["bbox"]) * (o["category_id"] == found["category_id"]) for o in left]
        best = max(range(len(left)), key=overlaps.__getitem__, default=None)
        if best is not None and overlaps[best] >= OVERLAP:
            del left[best]
            matches += 1
        elif any(
            o["category_id"] == found["category_id"] and overlap(found["bbox"], o["bbox"], crowd=True) >= OVERLAP
            for o in crowds
        ):
            continue
        counted += 1
    return 2 * matches / (wanted + counted) if wanted + counted else 1.0


def overlap(box: Sequence[float], other: Sequence[float], *, crowd: bool = False) -> float:
    """Return intersection over union of two boxes x, y, width, height; over the first box's area alone for a crowd."""
    width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    area, shared = box[2] * box[3], width * height
    return shared / (area if crowd else area + other[2] * other[3] - shared)
