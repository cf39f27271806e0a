"""Detectors as the subject of COCO detection: torchvision's modules, or a file of finished detections."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vislm.errors import UnknownName, UsageError
from vislm.eval.protocol import Asked, Subject
from vislm.eval.vision import detector_models
from vislm.eval.vision.coco_annotations import COCO_IDS
from vislm.eval.vision.detection_metrics import mask_tools
from vislm.eval.vision.model_spec import RANDOM, read_spec, weights_digest
from vislm.eval.vision.stored_detections import StoredDetections

LABELS = ("coco", "contiguous")
"""What a model's labels are: COCO's category ids, or 1 to 80 for its categories in the order of their ids."""
MASK_THRESHOLD = 0.5


@contextlib.contextmanager
def open_detector(
    model: str, prune: Sequence[str], heads: Sequence[str], dtype: str | None, device: str
) -> Iterator[Subject]:
    """Open a detector.

    Args:
        model: ``NAME@WEIGHTS[:option=value,...]``, see ``detector_models.build``; labels=contiguous for models that
            number COCO's 80 categories 1 to 80 (default if num_classes is 81); or a file of finished detections
            (.json, COCO's results format).
        prune: nothing.
        heads: nothing.
        dtype: float32.
        device: cpu, cuda, ...

    Raises:
        UnknownName: no such model, option or way of numbering.
        UsageError: pruning or head methods, which act in language models, or another dtype.
        CheckpointError: weights that do not fit.
    """
    if prune or heads:
        raise UsageError(f"{[*prune, *heads]} cannot act in a detector; leave --prune and --heads out")
    if dtype not in (None, "float32"):
        raise UsageError(f"dtype {dtype}: detectors are evaluated in float32")
    if model.endswith(".json"):
        yield StoredDetections(Path(model))
        return
    spec = read_spec(model, detector_models.OPTIONS, detector_models.LIBRARY_WEIGHTS)
    classes = spec.options.get("num_classes", detector_models.COCO_CLASSES)
    labels = spec.options.get("labels", LABELS[classes == len(COCO_IDS) + 1])
    _check_labels(labels)
    detector = detector_models.build(spec)
    identity = {
        "model": spec.name,
        "weights": spec.weights if spec.weights == RANDOM else weights_digest(spec, detector),
        **{f"detector.{key}": value for key, value in sorted(spec.options.items())},
        "torchvision": version("torchvision"),
        "timm": version("timm"),
    }
    yield Detector(detector, identity, labels=labels, device=device)


class Detector:
    """A module with the interface of torchvision's detectors.

    Pictures go through it one by one, as in torchvision's own evaluation: in a batch they would be padded to a common
    size, and what is found would depend on the neighbours.

    Args:
        model: takes a list of pictures (3, H, W) in [0, 1] and returns "boxes" (x1, y1, x2, y2), "labels", "scores"
            and perhaps "masks" (N, 1, H, W) for each.
        identity: what determines its detections, flat.
        labels: one of ``LABELS``.
        device: where it runs.

    Raises:
        UnknownName: no such way of numbering.
    """

    def __init__(
        self, model: nn.Module, identity: dict[str, Any], *, labels: str = "coco", device: str = "cpu"
    ) -> None:
        _check_labels(labels)
        self._model, self._identity, self._labels = model.eval().to(device), identity, labels
        self._device = device

    def fingerprint(self) -> dict[str, Any]:
        """Return weights, options and numbering, flat."""
        return {**self._identity, "labels": self._labels, "mask_threshold": MASK_THRESHOLD}

    @torch.inference_mode()
    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """Return "detections" in COCO's results format and whether they hold "masks"; see ``coco_detection``.

        Raises:
            UsageError: a sample without exactly one picture, or a label that the numbering does not know.
        """
        rows = []
        for asked in batch:
            if len(asked.images) != 1:
                raise UsageError(f"sample {asked.sample.id} has {len(asked.images)} pictures; expected one")
            began = time.perf_counter()
            pixels = torch.from_numpy(np.array(asked.images[0])).permute(2, 0, 1).float() / 255
            (found,) = self._model([pixels.to(self._device)])
            row = {"text": "", "detections": self._detections(found), "masks": "masks" in found}
            rows.append({**row, "seconds": time.perf_counter() - began})
        return rows

    def _detections(self, found: dict[str, Tensor]) -> list[dict[str, Any]]:
        boxes = found["boxes"].float().cpu()
        boxes[:, 2:] -= boxes[:, :2]
        detections = [
            {"category_id": self._category(label), "bbox": box, "score": score}
            for label, box, score in zip(
                found["labels"].tolist(), map(_short, boxes.numpy()), _short(found["scores"].cpu().numpy()), strict=True
            )
        ]
        if "masks" in found and detections:
            for detection, mask in zip(detections, _run_lengths(found["masks"]), strict=True):
                detection["segmentation"] = mask
        return detections

    def _category(self, label: int) -> int:
        if self._labels == "coco":
            return label
        if not 1 <= label <= len(COCO_IDS):
            raise UsageError(f"the detector gives label {label}; labels=contiguous means 1 to {len(COCO_IDS)}")
        return COCO_IDS[label - 1]


def _check_labels(labels: str) -> None:
    if labels not in LABELS:
        raise UnknownName("numbering of labels", labels, LABELS)


def _short(values: np.ndarray) -> list[float]:
    """Return single-precision numbers by as few digits as tell them apart."""
    return [float(str(value)) for value in values.astype(np.float32)]


def _run_lengths(masks: Tensor) -> list[dict[str, Any]]:
    """Return COCO's packed run lengths of soft masks (N, 1, H, W)."""
    hard = (masks[:, 0] > MASK_THRESHOLD).to(torch.uint8).cpu().numpy()
    packed = mask_tools().encode(np.asfortranarray(hard.transpose(1, 2, 0)))
    return [{"size": [int(v) for v in p["size"]], "counts": p["counts"].decode("ascii")} for p in packed]
