"""COCO detection and instance segmentation: average precision of boxes and masks.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, arXiv 1405.0312; torchvision's references
(the protocol: pictures one by one at their own size, all pictures of the split).

A row's "detections" are COCO's results format without the picture: "category_id" (COCO's own ids), "bbox" (x, y, width,
height in pixels), "score", and "segmentation" (packed run lengths) if the row's "masks" is true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError, UnknownName, UsageError
from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict
from vislm.eval.reading import shown
from vislm.eval.vision.coco_annotations import COCO_IDS, CocoImage, Instances, read_instances
from vislm.eval.vision.detection_metrics import ENGINES, STATS, DetectionScores, average_precision
from vislm.eval.vision.label_maps import picture_size
from vislm.eval.vision.picture_f1 import picture_f1
from vislm.eval.vision.run_lengths import mask_fault
from vislm.files import sha256

PUBLISHED = {"instances_val2017.json": (5000, 36781), "instances_val2014.json": (40504, 291875)}
"""Instances file -> pictures and annotations."""
KINDS = {"box": "bbox", "mask": "segm"}


@dataclass(frozen=True)
class CocoDetection(Benchmark):
    """COCO's twelve numbers for boxes and, from a detector with masks, for masks. One picture's score is its F1."""

    truth: Instances
    settings: Mapping[str, Any]
    engine: str = "pycocotools"
    control: Control = "none"
    faults: Sequence[str] = field(default_factory=list)
    name = "coco_detection"
    subject = "detector"
    figures = (Figure("F1 at IoU 0.5"),)

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per picture, those without objects included."""
        return [Sample(str(i.id), (i.path,), "", truth=self._shown(i.id)) for i in self.truth.images]

    def _shown(self, image: int) -> list[dict[str, Any]]:
        """Return a picture's objects for readers of a row."""
        names = self.truth.categories
        return [
            {"category": names[a["category_id"]], "bbox": a["bbox"], **({"crowd": True} if a["iscrowd"] else {})}
            for a in self._objects[image]
        ]

    @cached_property
    def _objects(self) -> dict[int, list[Mapping[str, Any]]]:
        found: dict[int, list[Mapping[str, Any]]] = {i.id: [] for i in self.truth.images}
        for a in self.truth.annotations:
            found[a["image_id"]].append(a)
        return found

    @cached_property
    def _images(self) -> dict[str, CocoImage]:
        return {str(i.id): i for i in self.truth.images}

    @cached_property
    def _scored(self) -> dict[str, Any]:
        """Rows that were scored last and what came of them: metrics and groups are asked for one after the other."""
        return {}

    @property
    def protocol(self) -> dict[str, Any]:
        """Split, digest of the annotations, and how many there are."""
        return {**self.settings, "n_images": len(self.truth.images), "n_annotations": len(self.truth.annotations)}

    def parse(self, row: Row) -> Verdict:
        """Return how many detections there are, with the F1 of those with a score of at least 0.5 (boxes, IoU 0.5).

        Raises:
            AnnotationError: detections that are not of the form above.
        """
        image, found = self._images[row["id"]], row.get("detections")
        if not isinstance(found, list):
            raise AnnotationError(f"row {row['id']}: 'detections' is {shown(found)}; expected a list")
        for number, detection in enumerate(found):
            if fault := _fault(detection, image, bool(row.get("masks"))):
                raise AnnotationError(f"row {row['id']}, detection {number}: {fault}")
        return Verdict(len(found), picture_f1(self._objects[image.id], found), {"detections": float(len(found))})

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return the twelve numbers as box_AP, box_AP50, ..., mask_AP, ... over the pictures that are there.

        As in COCO's scorer, -1 stands for "nothing of the kind in these pictures".
        """
        if not rows:
            return {**{f"box_{name}": 0.0 for name in STATS}, "n": 0, "warnings": ["no pictures"]}
        metrics: dict[str, Any] = {
            f"{kind}_{name}": value
            for kind, scores in self._score(rows).items()
            for name, value in scores.stats.items()
        }
        metrics["n"] = len(rows)
        metrics["n_detections"] = sum(len(row["detections"]) for row in rows.values())
        unknown = {d["category_id"] for row in rows.values() for d in row["detections"]} - self.truth.categories.keys()
        warnings = [f"detections of categories that the annotations lack: {sorted(unknown)}"] if unknown else []
        if all(row.get("masks") for row in rows.values()) and not self._has_masks(rows):
            warnings.append("masks are not scored: some annotations have no segmentation")
        return {**metrics, "warnings": warnings} if warnings else metrics

    def groups(self, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return the AP for each category that the pictures show."""
        scores = self._score(rows) if rows else {}
        found: dict[str, dict[str, Any]] = {}
        for category, name in self.truth.categories.items():
            each = {f"{k}_AP": s.per_category[category] for k, s in scores.items() if category in s.per_category}
            if each:
                found[name] = each
        return found

    def _score(self, rows: Rows) -> dict[str, DetectionScores]:
        if self._scored.get("rows") is not rows:
            images = [self._images[i].id for i in rows]
            kinds = KINDS if self._has_masks(rows) else {"box": "bbox"}
            found = [{**d, "image_id": self._images[i].id} for i, row in rows.items() for d in row["detections"]]
            truth = self.truth.scored()
            scores = {
                name: average_precision(truth, found, kind, images=images, engine=self.engine)  # pyright: ignore[reportArgumentType]
                for name, kind in kinds.items()
            }
            self._scored.update(rows=rows, scores=scores)
        return self._scored["scores"]

    def _has_masks(self, rows: Rows) -> bool:
        return all(row.get("masks") for row in rows.values()) and all(
            "segmentation" in a for a in self.truth.annotations
        )


def _fault(detection: Any, image: CocoImage, masks: bool) -> str | None:
    if not isinstance(detection, dict) or type(detection.get("category_id")) is not int:
        return f"{shown(detection)} has no whole number under 'category_id'"
    box: Any = detection.get("bbox")
    score: Any = detection.get("score")
    values: list[Any] = box if isinstance(box, list) and len(box) == 4 else [None]
    if not all(type(v) in (int, float) and abs(v) < 1e9 for v in values) or box[2] < 0 or box[3] < 0:
        return f"bbox is {shown(box)}; expected x, y, width, height, finite"
    if type(score) not in (int, float) or not abs(score) < 1e9:
        return f"score is {shown(score)}; expected a finite number"
    if masks:
        mask: Any = detection.get("segmentation")
        if fault := mask_fault(mask, image.width, image.height):
            return f"segmentation {fault}"
        if not isinstance(mask["counts"], str):
            return "segmentation has plain run lengths; expected the packed form"
    return None


def load(path: Path, *, split: str = "auto", engine: str = "pycocotools", control: Control = "none") -> CocoDetection:
    """Read pictures with boxes and masks.

    Args:
        path: a folder with annotations/instances_val2017.json and val2017/ (COCO's own layout), or with instances.json
            and images/.
        split: val2017, train2017, ...; "auto" takes the only instances file that is there.
        engine: pycocotools, or faster (faster-coco-eval, equal figures in less time).
        control: grey pictures or not.

    Raises:
        UnknownName: no such engine.
        AnnotationError: files that are missing, no JSON or ambiguous; bad entries become ``faults`` instead.
    """
    if engine not in ENGINES:
        raise UnknownName("detection engine", engine, ENGINES)
    faults: list[str] = []
    truth = read_instances(path, split, faults)
    settings = {"split": split, "file": truth.file.name, "annotations": sha256(truth.file)[:16]}
    return CocoDetection(truth, settings, engine, control, faults)


def suspicions(benchmark: Benchmark) -> list[str]:
    """Return what is not as published: other counts or categories, pictures of another size than declared."""
    if not isinstance(benchmark, CocoDetection):
        raise UsageError(f"{benchmark.name} is not coco_detection")
    truth, found = benchmark.truth, []
    counts, published = (len(truth.images), len(truth.annotations)), PUBLISHED.get(truth.file.name.removesuffix(".gz"))
    if published and counts != published:
        found.append(
            f"{counts[0]} pictures with {counts[1]} annotations; the published file has {published[0]} with "
            f"{published[1]}"
        )
    if tuple(sorted(truth.categories)) != COCO_IDS:
        found.append(f"{len(truth.categories)} categories that are not COCO's 80 (ids 1 to 90 with gaps)")
    found += [fault for image in truth.images if (fault := _size_fault(image))]
    return found


def _size_fault(image: CocoImage) -> str | None:
    size, declared = picture_size(image.path), (image.width, image.height)
    if size in (None, declared):
        return None  # missing and broken pictures are faults
    return f"{image.path.name}: {size} pixels; the annotations say {declared}"
