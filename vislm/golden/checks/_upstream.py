"""Gradients of fixtures whose upstream gradient is a ramp from -1 to 1 over the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vislm.golden.checks._gradients import TOLERANCE, compare_gradients
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, difference


def compare_ramp_gradients(
    fixture: Fixture, leaves: Mapping[str, Tensor], output: Tensor, name: str = "y", tolerance: float = TOLERANCE
) -> Iterator[Comparison]:
    """Compare every ``grad.<name>``, of ``sum(output * linspace(-1, 1))``, or of ``in.grad_<output>`` where given."""
    if not fixture.grads:
        return
    if any(key.startswith("grad_") for key in fixture.inputs):
        yield from compare_gradients(fixture, leaves, {name: output}, tolerance)
        return
    missing = fixture.grads.keys() - leaves.keys()
    if missing:
        raise Unhandled(f"gradients of {sorted(missing)}: not known how they came about")
    ramp = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    gradients = torch.autograd.grad((output * ramp).sum(), [leaves[key] for key in fixture.grads])
    for (key, theirs), ours in zip(fixture.grads.items(), gradients, strict=True):
        yield difference(f"grad.{key}", ours, theirs, tolerance)
