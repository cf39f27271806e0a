"""CHAIR's fixtures: sentences, the singulariser's table, captions, and whole files of captions."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vislm.eval.captions.chair_scores import CaptionScore, overall, read_object_table, score_caption
from vislm.eval.captions.singularize import singularize
from vislm.eval.captions.vocabulary import coco_vocabulary
from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, exact

OVERALL = {"CHAIRs": "CHAIR_s", "CHAIRi": "CHAIR_i", "Recall": "Recall", "mean_tokens": "Length"}


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Tell the kinds apart by their keys."""
    data = fixture.data
    if "table" in data:
        yield exact("singularize", {w: singularize(w) for w in data["table"]}, data["table"])
    elif "cases" in data:
        yield from _sentences(data["cases"])
    elif "captions" in data:
        yield from _captions(data)
    elif "overall" in data:
        yield from _files(fixture)
    else:
        raise Unhandled(f"keys {sorted(data)} belong to no known CHAIR fixture")


def _sentences(cases: list[dict[str, Any]]) -> Iterator[Comparison]:
    for number, case in enumerate(cases):
        score = score_caption(case["caption"], case["gt_objects"], coco_vocabulary())
        ours = {
            "tokens_after_merge": score.mentions.tokens,
            "object_words": score.mentions.words,
            "node_words": score.mentions.nodes,
            "word_indices": score.mentions.indices,
            "hallucinated": [list(pair) for pair in score.hallucinated],
        }
        for key in ours.keys() & case.keys():
            yield exact(f"{number}.{key}", ours[key], case[key])
        for key, value in (("CHAIRs", score.chair_s), ("CHAIRi", score.chair_i), ("Recall", score.recall)):
            if key in case.get("metrics", {}):
                yield Comparison(f"{number}.{key}", abs(value - case["metrics"][key]), 1e-12)


def _captions(data: dict[str, Any]) -> Iterator[Comparison]:
    scores = []
    for case in data["captions"]:
        score = score_caption(case["caption"], case["gt"], coco_vocabulary())
        scores.append(score)
        name = case["image_id"]
        yield exact(f"{name}.nodes", score.mentions.nodes, case["nodes"])
        yield exact(f"{name}.hallucinated", [list(p) for p in score.hallucinated], case["hallucinated"])
        yield exact(f"{name}.n_tokens", len(score.mentions.tokens), case["n_tokens"])
        yield Comparison(f"{name}.recall", abs(score.recall - case["recall"]), 1e-6)
    yield from _overall("overall", scores, {**data.get("overall", {}), "mean_tokens": data.get("mean_tokens")})


def _overall(name: str, scores: list[CaptionScore], expected: dict[str, Any]) -> Iterator[Comparison]:
    ours = overall(scores)
    for theirs, key in OVERALL.items():
        if expected.get(theirs) is not None:
            yield Comparison(f"{name}.{theirs}", abs(ours[key] - expected[theirs]), 1e-9)


def _files(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    table = _find(fixture, "coco_objects/chair_ground_truth_pattern2014.json.gz")
    truth = read_object_table(table, coco_vocabulary())
    keys = fixture.kwargs
    for name, expected in fixture.data["overall"].items():
        try:
            path = _find(fixture, f"chair_captions/{name.replace('/', '__')}.gz")
        except Unhandled:
            yield Skipped(name)  # the captions are not at hand; if none are, the fixture is unknown
            continue
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        image, caption = keys.get("image_id_key", "image_id"), keys.get("caption_key", "caption")
        scores = [score_caption(r[caption], truth[int(r[image])], coco_vocabulary()) for r in rows]
        yield from _overall(name, scores, expected)


def _find(fixture: Fixture, name: str) -> Path:
    for folder in fixture.data_dirs:
        if (folder / name).is_file():
            return folder / name
    raise Unhandled(f"needs the file {name} in a data folder (--data)")
