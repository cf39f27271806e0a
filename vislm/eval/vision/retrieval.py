"""Image-text retrieval: whose picture is a caption about, which captions belong to a picture.

Source: Karpathy and Fei-Fei, CVPR 2015, arXiv 1412.2306 (the splits); LAION-AI/CLIP_benchmark (the protocol).

A row holds the embeddings themselves: they resume, merge among processes and are scored again like any other answer,
and 512 numbers are 2.7 kB (the 5,000 pictures of COCO with 25,000 captions: 82 MB).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vislm.errors import AnnotationError, UsageError
from vislm.eval.captions import coco_captions
from vislm.eval.captions.coco_captions import Captioned
from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict
from vislm.eval.reading import find_optional
from vislm.eval.vision.embeddings import stacked, unpacked
from vislm.eval.vision.retrieval_metrics import KS, recalls

KARPATHY_FILES = ("dataset_coco.json", "dataset_flickr30k.json", "dataset.json")
PUBLISHED = {"dataset_coco.json": (5000, 25000), "dataset_flickr30k.json": (1000, 5000)}
"""Karpathy's file -> pictures of the test split, and captions with five each."""


@dataclass(frozen=True)
class Retrieval(Benchmark):
    """Recall at 1, 5, 10 in both directions. One picture alone has no score; its figure is its captions' cosine."""

    pictures: Sequence[Captioned]
    settings: Mapping[str, Any]
    control: Control = "none"
    faults: Sequence[str] = field(default_factory=list)
    name = "retrieval"
    subject = "image_text"
    figures = (Figure("cosine", "mean", ("cosine",)),)

    @cached_property
    def samples(self) -> list[Sample]:
        """One sample per picture, with its captions as choices."""
        return [Sample(p.id, (p.image,), "", truth=None, choices=p.captions) for p in self.pictures]

    @cached_property
    def _captions(self) -> dict[str, tuple[str, ...]]:
        return {p.id: p.captions for p in self.pictures}

    @property
    def protocol(self) -> dict[str, Any]:
        """Split, captions per picture, and how many there are."""
        captions = sum(len(p.captions) for p in self.pictures)
        return {**self.settings, "n_images": len(self.pictures), "n_captions": captions}

    def parse(self, row: Row) -> Verdict:
        """Return the mean cosine between the picture and its captions; recall needs all rows."""
        image, texts = self._embeddings(row)
        cosines = texts @ image / (np.linalg.norm(texts, axis=1) * np.linalg.norm(image))
        cosine = round(float(cosines.mean()), 6)
        return Verdict(cosine, None, {"cosine": cosine})

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return recall at 1, 5 and 10, text -> image and image -> text, and their mean; among the rows there are."""
        there = [p for p in self.pictures if p.id in rows]
        counts = {"n": len(there), "n_captions": sum(len(p.captions) for p in there)}
        if not there:
            return {**dict.fromkeys(_names(), 0.0), **counts, "warnings": ["no pictures"]}
        images, texts, owner, place = [], [], [], dict[str, int]()
        for number, p in enumerate(there):
            image, own = self._embeddings(rows[p.id])
            images.append(image)
            for caption, embedding in zip(p.captions, own, strict=True):
                place.setdefault(caption, len(texts))
                texts.append(texts[place[caption]] if place[caption] < len(texts) else embedding)
                owner.append(number)
        try:
            found = recalls(stacked(images, "pictures"), stacked(texts, "captions"), owner)
        except UsageError as error:
            raise AnnotationError(f"retrieval: {error}") from error
        return {**found, **counts}

    def _embeddings(self, row: Row) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        where, captions = f"row {row['id']}", self._captions[row["id"]]
        texts = row.get("texts")
        if not isinstance(texts, list) or len(texts) != len(captions):
            raise AnnotationError(f"{where}: expected one embedding under 'texts' for each of {len(captions)} captions")
        image = unpacked(row.get("image"), f"{where}, picture")
        vectors = [unpacked(text, f"{where}, captions") for text in texts]
        return image, stacked([image, *vectors], where)[1:]


def _names() -> list[str]:
    return [f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in KS] + ["mean_recall"]


def load(path: Path, *, split: str = "auto", captions: int = 5, control: Control = "none") -> Retrieval:
    """Read pictures with captions in Karpathy's or COCO's format.

    Args:
        path: a folder with dataset_coco.json or dataset_flickr30k.json and the pictures below, with captions.json and
            images/, or in COCO's own layout (annotations/captions_val2014.json and val2014/).
        split: karpathy-test, karpathy-val, val2014, ...; "auto": karpathy-test if there is such a file, else the only
            captions file.
        captions: how many of each picture, from the first on; 0: all.
        control: grey pictures or not.

    Raises:
        UsageError: captions below 0.
        AnnotationError: files that are missing, no JSON or ambiguous; bad entries become ``faults`` instead.
    """
    if captions < 0:
        raise UsageError(f"captions={captions}: expected a whole number >= 0")
    if split == "auto" and find_optional(path, KARPATHY_FILES) is not None:
        split = f"{coco_captions.KARPATHY}test"
    read = coco_captions.load(path, split=split)
    pictures = [Captioned(p.id, p.image, p.captions[: captions or None]) for p in read.pictures]
    return Retrieval(pictures, {**read.settings, "captions": captions}, control, read.faults)


def suspicions(benchmark: Benchmark) -> list[str]:
    """Return what is not as published: fewer pictures or captions than Karpathy's test split."""
    if not isinstance(benchmark, Retrieval):
        raise UsageError(f"{benchmark.name} is not retrieval")
    counts = (len(benchmark.pictures), sum(len(p.captions) for p in benchmark.pictures))
    published = PUBLISHED.get(str(benchmark.settings["file"]).removesuffix(".gz"))
    found = []
    if published and benchmark.settings["split"] == "karpathy-test" and counts != published:
        found.append(
            f"{counts[0]} pictures with {counts[1]} captions; the published test split has {published[0]} with "
            f"{published[1]} (five each): recalls are not comparable"
        )
    wanted = benchmark.settings["captions"]
    few = [p.id for p in benchmark.pictures if len(p.captions) < wanted]
    if few:
        found.append(f"{len(few)} pictures have fewer than {wanted} captions, first {few[0]}")
    return found
