"""VAR's fixtures: sink tokens of a prefill, the head test, and the edited attention of prefill and decode."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vislm.golden.checks._complete import compared
from vislm.golden.fixtures import Comparison, Fixture, Skipped, difference, exact
from vislm.heads import var


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Compare what follows from the hidden states and the attention before the edit."""
    yield from compared(fixture, _compare(fixture))


def _compare(fixture: Fixture) -> Iterator[Comparison]:
    inputs, out, options = fixture.inputs, fixture.outputs, fixture.kwargs
    sinks = var.sink_tokens(inputs["hidden_states"], options["dim_sink"], options["tau"])
    yield exact("sink_indices", sinks[0].nonzero().flatten(), out["sink_indices"])
    start, end = options["image_start"], options["image_start"] + options["image_len"]
    image = torch.zeros_like(sinks)
    image[:, start:end] = True
    groups = var.sink_groups(image, sinks)
    for phase in ("prefill", "decode"):
        weights = inputs[f"attention_{phase}"]
        rows = var.image_centric(masses := var.group_masses(weights, groups), groups, options["rho"], options["summ"])
        yield exact(f"head_query_{phase}", rows.nonzero(), out[f"head_query_{phase}"])
        if phase == "prefill":
            rows = rows & (torch.arange(weights.shape[2]) >= end)
        edited = var.redistribute(weights, masses, groups, rows, options["p"])
        yield difference(f"attention_{phase}", edited, out[f"attention_{phase}"], 1e-5)
