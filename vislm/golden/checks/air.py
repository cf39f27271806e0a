"""AIR's fixtures: the projection of attention matrices, and the rescaling of logit matrices."""

from __future__ import annotations

from collections.abc import Iterator

from vislm.golden.fixtures import Comparison, Fixture, difference
from vislm.heads.air import project, rescale_gain


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare what the fixture has of both phases and of the logits."""
    options = {name: fixture.kwargs[name] for name in ("beta", "scale", "eps") if name in fixture.kwargs}
    for phase in ("prefill", "decode"):
        if f"attention_{phase}" in fixture.inputs:
            ours = project(fixture.inputs[f"attention_{phase}"], **options)
            yield difference(f"projected_{phase}", ours, fixture.outputs[f"projected_{phase}"], 1e-5)
    if "logits" in fixture.inputs:
        logits = fixture.inputs["logits"]
        gain = rescale_gain(logits.square().sum((-2, -1)))
        yield difference("rescaled_logits", logits * gain[..., None, None], fixture.outputs["rescaled_logits"], 1e-4)
