"""VCD's fixtures: the noise schedule, and the contrasted logits."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from vislm.golden.fixtures import Comparison, Fixture, Unhandled, difference, exact
from vislm.heads import vcd


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare the noised image of every step, and the logits and which of them are ruled out."""
    inputs, out, options = fixture.inputs, fixture.outputs, fixture.kwargs
    steps = sorted(int(name.removeprefix("noisy_image_step")) for name in out if name.startswith("noisy_image_step"))
    if not steps and "contrastive_logits" not in out:
        raise Unhandled(f"outputs {sorted(out)} belong to no known VCD fixture")
    for step in steps:
        noisy = vcd.add_noise(inputs["image"], inputs[f"noise_step{step}"], step)
        yield difference(f"noisy_image_step{step}", noisy, out[f"noisy_image_step{step}"], 1e-5)
    if "contrastive_logits" in out:
        expected = out["contrastive_logits"]
        ours = vcd.contrast(inputs["logits"], inputs["logits_distorted"], options["alpha"], options["beta"])
        yield exact("contrastive_logits: ruled out", ours.isneginf(), expected.isneginf())
        yield difference("contrastive_logits", _finite(ours), _finite(expected), 1e-4)


def _finite(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits.isneginf(), 0.0)
