"""POPE's fixtures: answers and their metrics, and questions built from objects."""

from __future__ import annotations

import random
from collections.abc import Iterator

from vislm.eval.questions.pope_answers import metrics, parse
from vislm.eval.questions.pope_build import build, statistics
from vislm.eval.questions.pope_questions import SPLITS, TEMPLATE
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, exact

FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Tell the kinds apart by their keys."""
    data = fixture.data
    if "answers" in data:
        yield from _answers(fixture, data["answers"], data["labels"], data["pred"])
    elif "items" in data:
        items = data["items"]
        yield from _answers(
            fixture, [i["answer"] for i in items], [i["label"] for i in items], [i["pred"] for i in items]
        )
    elif "segmentation" in data:
        yield from _build(fixture)
    else:
        raise Unhandled(f"keys {sorted(data)} belong to no known POPE fixture")


def _answers(fixture: Fixture, answers: list[str], labels: list[str], expected: list[str]) -> Iterator[Comparison]:
    predictions = [parse(a) for a in answers]
    yield exact("predictions", predictions, expected)
    ours = metrics(labels, predictions)
    for key in ("TP", "FP", "TN", "FN"):
        if key in fixture.data:
            yield exact(key, ours[key], fixture.data[key])
    for key in FIGURES:
        if key in fixture.data:
            yield Comparison(key, abs(ours[key] - fixture.data[key]), 1e-12)


def _build(fixture: Fixture) -> Iterator[Comparison]:
    data, options = fixture.data, fixture.kwargs
    objects = {row["image"]: row["objects"] for row in data["segmentation"]}
    counts, together = statistics(objects)
    if "ground_truth_objects" in data:
        yield exact("ground_truth_objects", list(counts.items()), list(data["ground_truth_objects"].items()))
    if "co_occur" in data:
        ours = {o: sorted(row, key=lambda p: -row[p]) for o, row in together.items()}
        theirs = {o: [n if isinstance(n, str) else n[0] for n in row] for o, row in data["co_occur"].items()}
        yield exact("co_occur", ours, theirs)
    for split in SPLITS:
        if split not in data:
            continue
        built = build(
            objects,
            split,
            random.Random(options.get("seed", 0)),
            per_image=options.get("sample_num", 3),
            template=options.get("template", TEMPLATE),
            legacy_article=True,
        )
        ours = [
            {"question_id": int(q.id.split("/")[1]), "image": q.image, "text": q.text, "label": q.label} for q in built
        ]
        yield exact(split, ours, data[split])
