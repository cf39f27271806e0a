"""DivPrune's fixtures: the distance matrix and the order of selection."""

from __future__ import annotations

from collections.abc import Iterator

from vislm.golden.fixtures import Comparison, Fixture, exact, relative
from vislm.lmm.choosing.tokens import token_count
from vislm.token_pruning import divprune


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare distances, order and the kept indices."""
    tokens = fixture.inputs["visual_tokens"]
    out = fixture.outputs
    if "distance_matrix" in out:
        yield relative("distance_matrix", divprune.cosine_distance(tokens, tokens), out["distance_matrix"], 2e-6, 0.0)
    order = divprune.max_min_diversity(tokens, token_count(float(fixture.kwargs["threshold_ratio"]), len(tokens)))
    yield exact("selected_order", order, out["selected_order"])
    yield exact("selected_sorted", order.sort().values, out["selected_sorted"])
