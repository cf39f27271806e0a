"""SPIN's fixtures: one attention layer whose last row suppresses the heads that look least at the image."""

from __future__ import annotations

from collections.abc import Iterator

from vislm.golden.checks._edited_layer import edited_layer
from vislm.golden.fixtures import Comparison, Fixture, difference
from vislm.heads.spin import SPIN


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare the layer's outputs in both phases."""
    options = fixture.kwargs
    method = SPIN(keep_ratio=options["keep_ratio"], suppressed_scale=options.get("suppressed_scale") or 0.0)
    for phase in ("prefill", "decode"):
        if f"hidden_{phase}" in fixture.inputs:
            output, _ = edited_layer(fixture, phase, method.edit)
            yield difference(f"output_{phase}", output, fixture.outputs[f"output_{phase}"], 1e-5)
