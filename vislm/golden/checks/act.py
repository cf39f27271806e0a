"""ACT's fixtures: the calibrated attention of one prompt, for one head and for a list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vislm.golden.checks._complete import compared
from vislm.golden.fixtures import Comparison, Fixture, Skipped, difference
from vislm.heads import act


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Compare the edited attention."""
    yield from compared(fixture, _compare(fixture))


def _compare(fixture: Fixture) -> Iterator[Comparison]:
    options, out = fixture.kwargs, fixture.outputs
    for name, heads in (("one_head", [options["calibrated_head"]]), ("head_list", options["head_list"])):
        edited = _calibrated(fixture.inputs["attention"], heads, options["threshold"], options["beta"])
        yield difference(f"attention_{name}", edited, out[f"attention_{name}"], 1e-5)


def _calibrated(attention: Tensor, heads: Sequence[int], threshold: float, beta: float) -> Tensor:
    chosen, edited = attention[:, list(heads)], attention.clone()
    valid = torch.ones(attention.shape[0], attention.shape[-1], dtype=torch.bool)
    sinks = act.sink_keys(act.mean_received(chosen.sum(2), valid), valid, threshold)
    edited[:, list(heads)] = act.calibrate(chosen, sinks, beta)
    return edited
