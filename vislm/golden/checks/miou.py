"""Fixtures of semantic segmentation: areas by class and the means that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from vislm.eval.vision import miou
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, exact

TOLERANCE = 1e-6


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare areas exactly, and IoU, accuracy and Dice by class and as means."""
    data, options = fixture.data, fixture.kwargs
    if "images" not in data or "num_classes" not in options:
        raise Unhandled(f"keys {sorted(data)} belong to no known segmentation fixture")
    classes, ignored = options["num_classes"], options.get("ignore_index", miou.IGNORED)
    labels = [np.asarray(image["label"]) for image in data["images"]]
    if options.get("reduce_zero_label"):
        labels = [miou.without_zero(label, ignored) for label in labels]
    parts = (
        miou.confusion(label, np.asarray(image["pred"]), classes, ignored)
        for label, image in zip(labels, data["images"], strict=True)
    )
    matrix = miou.summed(map(miou.sparse, parts), classes)
    for name, area in miou.areas(matrix).items():
        if f"area_{name}" in data:
            yield exact(f"area_{name}", area, [int(v) for v in data[f"area_{name}"]])
    for name, values in miou.per_class(matrix).items():
        if name in data:
            yield Comparison(name, _worst(values, data[name]), TOLERANCE)
    for name, value in miou.scores(matrix).items():
        if name in data:
            yield Comparison(name, abs(value - data[name]), TOLERANCE)


def _worst(ours: Sequence[float], theirs: Sequence[float | None]) -> float:
    """Return the largest error; infinite where only one of the two has a value."""
    if len(ours) != len(theirs) or any(math.isnan(a) != (b is None) for a, b in zip(ours, theirs, strict=True)):
        return math.inf
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=True) if b is not None), default=0.0)
