"""Gradients of a fixture: of ``sum(out.* * in.grad_*)`` with respect to inputs and parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vislm.golden.fixtures import Comparison, Fixture, Unhandled, difference

TOLERANCE = 1e-4


def compare_gradients(
    fixture: Fixture, leaves: Mapping[str, Tensor], outputs: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> Iterator[Comparison]:
    """Compare every ``grad.<name>`` of the fixture.

    Args:
        fixture: with ``in.grad_<output>`` for one output or more.
        leaves: name -> tensor that took part, for every gradient of the fixture.
        outputs: name -> what was computed from them.
        tolerance: largest absolute error.
    """
    if not fixture.grads:
        return
    upstream = {name: fixture.inputs[f"grad_{name}"] for name in outputs if f"grad_{name}" in fixture.inputs}
    missing = fixture.grads.keys() - leaves.keys()
    if missing or not upstream:
        raise Unhandled(f"gradients of {sorted(missing)} from {sorted(upstream)}: not known how they came about")
    total = torch.stack([(outputs[name] * gradient).sum() for name, gradient in upstream.items()]).sum()
    gradients = torch.autograd.grad(total, [leaves[name] for name in fixture.grads])
    for (name, theirs), ours in zip(fixture.grads.items(), gradients, strict=True):
        yield difference(f"grad.{name}", ours, theirs, tolerance)
