"""CHAIR: how many of the objects that a caption mentions are not in the picture?

Source: Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156;
github.com/LisaAnne/Hallucination. ``chair_sources`` reads what pictures show, ``chair_scores`` scores captions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vislm.errors import UsageError
from vislm.eval.captions.chair_scores import CaptionScore, by_object, overall, score_caption
from vislm.eval.captions.chair_sources import find_pictures
from vislm.eval.captions.vocabulary import Vocabulary
from vislm.eval.coco import VAL2014
from vislm.eval.protocol import Benchmark, Control, Figure, Row, Rows, Sample, Verdict

PROMPT, TOKENS = "Please describe this image in detail.", 512
"""What nearly all papers about LMMs use; some allow 64 tokens only, which lowers CHAIR."""
SCENE_PROMPT, SCENE_TOKENS = "Describe the image.", 64


@dataclass(frozen=True)
class Chair(Benchmark):
    """CHAIR on captions of the given images."""

    paths: Mapping[str, Path]
    truth: Mapping[str, Collection[str]]
    vocabulary: Vocabulary
    prompt: str = PROMPT
    max_new_tokens: int = TOKENS
    control: Control = "none"
    how: str = "instances and captions"
    """What the truth is made of."""
    uncaptioned: int = 0
    """Pictures whose objects come from instances alone."""
    faults: Sequence[str] = field(default_factory=list)
    name = "chair"
    figures = (
        Figure("CHAIR_i", "ratio", ("hallucinated", "mentions"), better="lower"),
        Figure("CHAIR_s", "mean", ("chair_s",), better="lower"),
        Figure("Recall", "ratio", ("correct", "objects")),
        Figure("Length", "mean", ("length",), better="neither"),
    )

    @cached_property
    def samples(self) -> list[Sample]:
        """One caption per image."""
        return [Sample(i, (path,), self.prompt, truth=sorted(self.truth[i])) for i, path in self.paths.items()]

    @property
    def protocol(self) -> dict[str, Any]:
        """Prompt, length limit, scorer, and what the truth is made of."""
        return {
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "scorer": "pattern",
            "truth": self.how,
            "n_images": len(self.paths),
        }

    def parse(self, row: Row) -> Verdict:
        """Return the objects that the caption names; the score is 1 if none of them is absent."""
        scored = self._score(row["id"], row["text"])
        values = {
            "chair_s": scored.chair_s,
            "hallucinated": len(scored.hallucinated),
            "mentions": len(scored.mentions.nodes),
            "correct": len(scored.correct),
            "objects": len(scored.truth),
            "length": len(scored.mentions.tokens),
        }
        return Verdict(scored.mentions.nodes, 1.0 - scored.chair_s, values)

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Return CHAIR_s, CHAIR_i, Recall and Length over all captions."""
        return overall(list(self.per_caption(rows).values()))

    def groups(self, rows: Rows) -> dict[str, dict[str, Any]]:
        """Return for each object its mentions, how many were wrong, and the share of its images that name it."""
        return by_object(list(self.per_caption(rows).values())) if rows else {}

    def per_caption(self, rows: Rows) -> dict[str, CaptionScore]:
        """Return sample id -> its caption's objects, the wrong ones among them, and its own figures."""
        return {i: self._score(i, r["text"]) for i, r in rows.items() if i in self.truth}

    def _score(self, image: str, caption: str) -> CaptionScore:
        """Score a caption once: verdict, metrics and groups all need it."""
        known = self._scored
        if (image, caption) not in known:
            known[image, caption] = score_caption(caption, self.truth[image], self.vocabulary)
        return known[image, caption]

    @cached_property
    def _scored(self) -> dict[tuple[str, str], CaptionScore]:
        return {}


def load(
    path: Path,
    *,
    source: str = "auto",
    ids: str = "",
    draw: int | None = None,
    seed: int = 0,
    prompt: str = "",
    max_new_tokens: int | None = None,
    coco: str = VAL2014,
    control: Control = "none",
) -> Chair:
    """Read CHAIR.

    Args:
        path: folder in COCO's format (instances.json, captions.json, images/, or annotations/instances_val2014.json,
            annotations/captions_val2014.json, val2014/); or with the object table chair_ground_truth_....json.gz and
            the pictures in val2014/ or images/.
        source: annotations, table, or auto: annotations where there are any.
        ids: file in the folder that lists the images by id or name: a JSON list, JSON lines with "image_id", or one a
            line; "" asks about all (of a table: those that lie in the folder). Results on other images do not compare.
        draw: number of images to draw at random, 500 in most papers; None: all.
        seed: of the draw.
        prompt: what to ask; "" is "Please describe this image in detail." (of scenes "Describe the image.").
        max_new_tokens: longest caption; None: 512 (of scenes 64).
        coco: the part of COCO's own layout.
        control: grey pictures or not.

    Raises:
        UnknownName: no such source.
        UsageError: more images to draw than there are, or captions of no tokens.
        AnnotationError: files that are missing or no JSON. Broken rows become ``faults``; an image with a broken
            annotation is left out, as what it shows is then not known.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens}: expected a whole number >= 1")
    faults: list[str] = []
    found = find_pictures(path, source=source, ids=ids, coco=coco, draw=draw, seed=seed, faults=faults)
    usual = (SCENE_PROMPT, SCENE_TOKENS) if found.is_scenes else (PROMPT, TOKENS)
    return Chair(
        found.paths,
        found.truth,
        found.vocabulary,
        prompt or usual[0],
        max_new_tokens or usual[1],
        control,
        found.how,
        len(found.uncaptioned),
        faults,
    )


def suspicions(benchmark: Chair) -> list[str]:
    """Return what is no fault but raises or lowers the figures."""
    found = []
    if benchmark.uncaptioned:
        found.append(
            f"{benchmark.uncaptioned} images have no captions by people: their objects come from instances alone, "
            "which raises CHAIR"
        )
    bare = [name for name, shown in benchmark.truth.items() if not shown]
    if bare:
        found.append(f"{len(bare)} images show no object, first {bare[0]}: every mention there is a hallucination")
    return found
