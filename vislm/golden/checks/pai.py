"""PAI's fixtures: one attention layer with its last row edited, and the text-only guidance."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vislm.golden.checks._edited_layer import edited_layer
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, difference, exact
from vislm.heads.pai import PAI, guide


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Tell the kinds apart by the tensors that they hold."""
    if "logits_text_only" in fixture.inputs:
        yield from _guidance(fixture)
    elif "hidden_prefill" in fixture.inputs:
        yield from _layer(fixture)
    else:
        raise Unhandled(f"inputs {sorted(fixture.inputs)} belong to no known PAI fixture")


def _layer(fixture: Fixture) -> Iterator[Comparison]:
    method, out = PAI(alpha=fixture.kwargs["alpha"]), fixture.outputs
    for phase in ("prefill", "decode"):
        if f"hidden_{phase}" not in fixture.inputs:
            continue
        output, weights = edited_layer(fixture, phase, method.edit)
        yield difference(f"output_{phase}", output, out[f"output_{phase}"], 1e-5)
        yield difference(f"attention_{phase}", weights, out[f"attention_{phase}"], 1e-5)
    if "attention_prefill_intervention_off" in out:
        _, plain = edited_layer(fixture, "prefill", lambda view: None)
        yield difference("attention_prefill_intervention_off", plain, out["attention_prefill_intervention_off"], 1e-5)


def _guidance(fixture: Fixture) -> Iterator[Comparison]:
    inputs, options = fixture.inputs, fixture.kwargs
    for gamma in options["gammas"]:
        scores = guide(inputs["logits"], inputs["logits_text_only"], gamma, options.get("cutoff", 0.1))
        name = f"scores_gamma_{gamma}"
        expected = fixture.outputs[name]
        yield exact(f"{name}: ruled out", scores.isneginf(), expected.isneginf())
        yield difference(name, _finite(scores), _finite(expected), 1e-4)


def _finite(scores: Tensor) -> Tensor:
    return torch.where(scores.isneginf(), -1e4, scores)
