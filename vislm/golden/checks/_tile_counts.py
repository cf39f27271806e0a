"""The fixture of the tile model: counts of visited tile pairs, found by brute force."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from vislm.golden.fixtures import Comparison, Fixture, exact
from vislm.kernels import Neighborhood
from vislm.kernels.simulator import simulate


def check_tile_counts(fixture: Fixture) -> Iterator[Comparison]:
    """Compare, case by case, the visited pairs (static), those without a mask, all, and the visited ones (dynamic)."""
    cases = cast("list[dict[str, Any]]", fixture.kwargs)
    for number, (case, counts) in enumerate(zip(cases, fixture.outputs["counts"], strict=True)):
        pattern = Neighborhood(
            case["layout"], case["kernel_size"], stride=case["stride"], causal=case.get("is_causal", False)
        )
        ours = simulate(pattern, case["q_tile"], case["kv_tile"])
        yield exact(f"counts[{number}]", [ours.static, ours.full, ours.pairs, ours.dynamic], counts)
