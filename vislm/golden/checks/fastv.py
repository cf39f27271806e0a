"""FastV's fixtures: a prefill with visual tokens dropped (or hidden) from one layer on."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vislm.golden.checks._models import prefill_llama
from vislm.golden.fixtures import Comparison, Fixture, exact, relative
from vislm.token_pruning.fastv import FastV


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare kept indices, the ranking row and the last hidden state."""
    options, out = fixture.kwargs, fixture.outputs
    start, count = options["sys_length"], options["image_token_length"]
    keep, layer, expected = options["attention_rank"], options["agg_layer"], out["last_hidden_state"]
    dropped = prefill_llama(fixture, start, count, FastV(keep=keep, layer=layer))
    yield exact("keep_indices", torch.tensor(dropped.kept), out["keep_indices"])
    if "attention_rank_layer_last_row" in out:
        yield relative(
            "attention_rank_layer_last_row", dropped.signals[0][0], out["attention_rank_layer_last_row"], 1e-5, 1e-4
        )
    if expected.shape[1] == fixture.inputs["inputs_embeds"].shape[1]:
        # mask mode: keys are hidden and their tokens go on being computed; what is kept comes out the same
        seats = torch.ones(expected.shape[1], dtype=torch.bool)
        seats[start : start + count] = False
        seats[start + out["keep_indices"]] = True
        expected = expected[:, seats]
    yield relative("last_hidden_state", dropped.hidden_states[-1], expected, 1e-3, 1e-4)
