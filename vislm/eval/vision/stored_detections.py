"""A file of finished detections in COCO's results format, in place of the detector that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError
from vislm.eval.protocol import Asked
from vislm.eval.reading import Fault, build_rows, read_json, whole_of
from vislm.files import sha256

_KEYS = ("category_id", "bbox", "score", "segmentation")


class StoredDetections:
    """Answers from a list of {"image_id", "category_id", "bbox", "score", perhaps "segmentation" (packed)}.

    Detections of pictures that are not asked for stay unused; pictures without detections have none.

    Raises:
        AnnotationError: a file that is missing, no JSON, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        faults: list[str] = []
        found = build_rows(path, read_json(path, list), _detection, faults)
        if faults:
            raise AnnotationError(f"{path}: {len(faults)} faults: {'; '.join(faults[:5])}")
        self._digest = sha256(path)[:16]
        self._masks = bool(found) and all("segmentation" in detection for _, detection in found)
        self._found: dict[str, list[dict[str, Any]]] = {}
        for image, detection in found:
            self._found.setdefault(image, []).append(detection)

    def fingerprint(self) -> dict[str, Any]:
        """Return the digest of the file."""
        return {"model": "stored detections", "weights": self._digest}

    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> list[dict[str, Any]]:
        """Return the detections of each picture, by the sample's id."""
        return [
            {
                "text": "",
                "detections": self._found.get(asked.sample.id, []),
                "masks": self._masks,
                "seconds": 0.0,
            }
            for asked in batch
        ]


def _detection(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    missing = [key for key in ("category_id", "bbox", "score") if key not in row]
    if missing:
        raise Fault(f"lacks {', '.join(missing)}")
    return str(whole_of(row, "image_id")), {key: row[key] for key in _KEYS if key in row}
