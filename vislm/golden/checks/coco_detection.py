"""Fixtures of COCO's detection scorer: boxes and masks, with both engines where they are installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from vislm.eval.vision.detection_metrics import ENGINES, STATS, average_precision
from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, exact

TOLERANCE = 1e-9


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Compare the twelve numbers and every category's AP."""
    data = fixture.data
    if not {"ground_truth", "detections", "results"} <= data.keys():
        raise Unhandled(f"keys {sorted(data)} belong to no known detection fixture")
    for engine, package in ENGINES.items():
        if find_spec(package) is None:
            yield Skipped(f"{engine} (not installed)")
            continue
        for kind, expected in data["results"].items():
            ours = average_precision(data["ground_truth"], data["detections"], kind, engine=engine)
            where = f"{engine}.{kind}"
            for name, value in zip(STATS, expected["stats"], strict=True):
                yield Comparison(f"{where}.{name}", abs(ours.stats[name] - value), TOLERANCE)
            yield from _categories(where, ours.per_category, expected.get("per_category_AP", {}))


def _categories(where: str, ours: dict[int, float], theirs: dict[str, float | None]) -> Iterator[Comparison]:
    there = {int(c): value for c, value in theirs.items() if value is not None and value > -1}
    if theirs:
        yield exact(f"{where}.categories", sorted(ours), sorted(there))
    for category in sorted(there.keys() & ours.keys()):
        yield Comparison(f"{where}.{category}", abs(ours[category] - there[category]), TOLERANCE)
