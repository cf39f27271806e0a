"""Average precision of boxes and masks, as COCO's own scorer computes it.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, arXiv 1405.0312. pycocotools is the
reference; faster-coco-eval gives the same figures in less time.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import numpy as np

from vislm.errors import UnknownName, UsageError

_PRECISION = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_RECALL = ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
STATS = _PRECISION + _RECALL
"""COCO's twelve numbers in its order: average precision over IoU 0.5 to 0.95, at 0.5, at 0.75, by area (below 32 x 32,
below 96 x 96, above), average recall with 1, 10, 100 detections per picture, by area."""
ENGINES = {"pycocotools": "pycocotools", "faster": "faster_coco_eval"}
"""Name -> package."""
_INSTALL = {"pycocotools": "pycocotools", "faster_coco_eval": "faster-coco-eval"}


@dataclass(frozen=True)
class DetectionScores:
    """What COCO's scorer says about all detections of some pictures."""

    stats: dict[str, float]
    """By the names in ``STATS``, fractions; -1 where the pictures hold nothing of the kind."""
    per_category: dict[int, float]
    """Category id -> AP; categories without an object in the pictures are absent."""


def average_precision(
    truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    kind: Literal["bbox", "segm"] = "bbox",
    *,
    images: Sequence[int] | None = None,
    engine: str = "pycocotools",
) -> DetectionScores:
    """Score detections against annotations in COCO's format; neither is changed.

    Detections that match a crowd are left out; a mask's area is its own, not its box's.

    Args:
        truth: "images", "annotations" and "categories" of an instances file.
        detections: "image_id", "category_id", "score", and "bbox" (x, y, width, height) or "segmentation" (compressed
            run lengths) according to ``kind``; what else they hold is not looked at.
        kind: boxes or masks.
        images: ids of the pictures that count; None: all.
        engine: pycocotools or faster (faster-coco-eval).

    Raises:
        UnknownName: no such engine.
        UsageError: the engine is not installed.
    """
    coco, evaluator = _engine(engine)
    wanted = {image["id"] for image in truth["images"]} if images is None else set(images)
    key = "bbox" if kind == "bbox" else "segmentation"
    # copies without the other key: the scorers write into what they get, and take areas from a box if there is one
    found = [
        {k: d[k] for k in ("image_id", "category_id", "score", key)} for d in detections if d["image_id"] in wanted
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        objects = coco()
        objects.dataset = {**truth, "annotations": [dict(row) for row in truth["annotations"]]}
        objects.createIndex()
        judge = evaluator(objects, _results(coco, objects, found), kind)
        judge.params.imgIds = sorted(wanted)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = np.asarray(judge.eval["precision"]).reshape(judge.eval["counts"])[:, :, :, 0, -1]
    each = {int(c): precision[:, :, place] for place, c in enumerate(judge.params.catIds)}
    return DetectionScores(
        {name: float(value) for name, value in zip(STATS, judge.stats, strict=False)},
        {c: float(values[values > -1].mean()) for c, values in each.items() if (values > -1).any()},
    )


def mask_tools() -> ModuleType:
    """Return the module that packs masks into run lengths: pycocotools' or faster-coco-eval's.

    Raises:
        UsageError: neither is installed.
    """
    with contextlib.suppress(ImportError):
        return import_module("pycocotools.mask")
    with contextlib.suppress(ImportError):
        return import_module("faster_coco_eval.core.mask")
    raise UsageError("masks need pycocotools, which is not installed; pip install 'vislm[eval]'")


def _engine(name: str) -> tuple[Any, Any]:
    if name not in ENGINES:
        raise UnknownName("detection engine", name, ENGINES)
    package = ENGINES[name]
    try:
        if name == "faster":
            module = import_module(package)
            return module.COCO, module.COCOeval_faster
        return import_module(f"{package}.coco").COCO, import_module(f"{package}.cocoeval").COCOeval
    except ImportError as error:
        raise UsageError(
            f"the detection engine {name} needs {_INSTALL[package]}, which is not installed; "
            f"pip install {_INSTALL[package]}"
        ) from error


def _results(coco: Any, objects: Any, found: list[dict[str, Any]]) -> Any:
    if found:
        return objects.loadRes(found)
    nothing = coco()  # loadRes looks at the first detection
    nothing.dataset = {"images": objects.dataset["images"], "categories": objects.dataset["categories"]}
    nothing.dataset["annotations"] = []
    nothing.createIndex()
    return nothing
