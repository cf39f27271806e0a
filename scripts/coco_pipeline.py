"""Files behind the COCO tables of docs/benchmarks.md: what no trained model at hand gives.

    python scripts/coco_pipeline.py detections DATA OUT   # truth.json, perturbed.json: COCO results for vislm eval
    python scripts/coco_pipeline.py captions   DATA OUT   # each person's captions against the other four people's
    python scripts/coco_pipeline.py clip            OUT   # an open_clip folder with random weights
    python scripts/coco_pipeline.py oracle     DATA OUT   # retrieval by an oracle

DATA is a folder with instances.json, captions.json and images/.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vislm.eval.protocol import Asked
from vislm.eval.running.runner import rescore, run
from vislm.eval.specs import open_benchmark

SEED = 0
MISSED, MISLABELLED, DOUBLED, MOVED, RESIZED = 0.15, 0.10, 0.10, 0.08, 0.15
"""Shares of objects; standard deviation of shifts and range of sizes, in shares of the box."""


def main() -> None:
    actions = {"detections": detections, "captions": captions, "clip": clip, "oracle": oracle}
    if len(sys.argv) < 3 or sys.argv[1] not in actions:
        sys.exit(__doc__)
    paths = [Path(argument) for argument in sys.argv[2:]]
    paths[-1].mkdir(parents=True, exist_ok=True)
    actions[sys.argv[1]](*paths)


def detections(data: Path, out: Path) -> None:
    """Write the annotated objects as if a detector had found them, and again with a detector's mistakes."""
    coco, rng = json.loads((data / "instances.json").read_text(encoding="utf-8")), random.Random(SEED)
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    ids = [category["id"] for category in coco["categories"]]
    truth, perturbed = [], []
    for found in (a for a in coco["annotations"] if not a["iscrowd"]):
        size, polygons = sizes[found["image_id"]], found["segmentation"]
        row = {k: found[k] for k in ("image_id", "category_id", "bbox")}
        truth.append({**row, "score": 1.0, "segmentation": run_lengths(polygons, size)})
        if rng.random() < MISSED:
            continue
        x, y, w, h = found["bbox"]
        shift = (rng.gauss(0, MOVED) * w, rng.gauss(0, MOVED) * h)
        box = [x + shift[0], y + shift[1], *(side * rng.uniform(1 - RESIZED, 1 + RESIZED) for side in (w, h))]
        moved = [[v + shift[k % 2] for k, v in enumerate(polygon)] for polygon in polygons]
        label = rng.choice(ids) if rng.random() < MISLABELLED else found["category_id"]
        wrong = {**row, "bbox": box, "category_id": label, "segmentation": run_lengths(moved, size)}
        times = 2 if rng.random() < DOUBLED else 1
        perturbed += [{**wrong, "score": round(rng.random(), 2)} for _ in range(times)]  # two digits: ties occur
    for name, rows in (("truth", truth), ("perturbed", perturbed)):
        (out / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        print(f"{name}.json: {len(rows)} detections")


def run_lengths(polygons: list[list[float]], size: tuple[int, int]) -> dict[str, Any]:
    import pycocotools.mask as tools

    runs = tools.merge(tools.frPyObjects(polygons, *size))
    return {"size": list(size), "counts": runs["counts"].decode()}


def captions(data: Path, out: Path) -> None:
    """Score the n-th caption of every picture against its other four."""
    whole: Any = open_benchmark("coco_captions", data)
    for n in range(5):
        path = out / f"person{n + 1}.jsonl"
        lines = (json.dumps({"id": p.id, "text": p.captions[n]}) + "\n" for p in whole.pictures)
        path.write_text("".join(lines), encoding="utf-8")
        others = [replace(p, captions=p.captions[:n] + p.captions[n + 1 : 5]) for p in whole.pictures]
        metrics = rescore(replace(whole, pictures=others), path)["metrics"]
        print(n + 1, {k: round(v, 4) for k, v in metrics.items() if isinstance(v, float)})


def clip(out: Path) -> None:
    """Write a small open_clip model with random weights."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    pixels = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": pixels}))
    torch.manual_seed(SEED)
    weights = open_clip.CLIP(**model).state_dict()
    save_file({name: w.contiguous() for name, w in weights.items()}, out / "open_clip_model.safetensors")


class Oracle:
    """A caption's embedding follows from its words; a picture's is the mean of its own captions'."""

    def fingerprint(self) -> dict[str, Any]:
        return {"model": "oracle"}

    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> list[dict[str, Any]]:
        from vislm.eval.vision.embeddings import packed

        own = [np.stack([self.embedding(text) for text in asked.sample.choices]) for asked in batch]
        return [{"text": "", "image": packed(v.mean(0)), "texts": [packed(t) for t in v], "seconds": 0.0} for v in own]

    @staticmethod
    def embedding(text: str) -> np.ndarray:
        digest = hashlib.sha256(text.encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big")).normal(size=256)


def oracle(data: Path, out: Path) -> None:
    """Run retrieval with the oracle: every recall is 1."""
    print(run(open_benchmark("retrieval", data), Oracle(), out)["metrics"])


if __name__ == "__main__":
    main()
