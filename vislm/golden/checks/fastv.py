"""FastV's fixtures: a prefill with visual tokens dropped (or hidden) from one layer on."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vislm.golden.checks._models import prefill_llama
from vislm.golden.fixtures import Comparison, Fixture, exact, relative
from vislm.token_pruning.fastv import FastV


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare kept indices, the ranking row and the last hidden state."""
    options, embeds = fixture.kwargs, fixture.inputs["inputs_embeds"]
    start, count = options["sys_length"], options["image_token_length"]
    method = FastV(keep=options["attention_rank"], layer=options["agg_layer"])
    prefill = prefill_llama(fixture, start, count, method)
    kept = torch.tensor(prefill.kept)
    yield exact("keep_indices", kept, fixture.outputs["keep_indices"])
    if "attention_rank_layer_last_row" in fixture.outputs:
        yield relative("last row", prefill.signals[0][0], fixture.outputs["attention_rank_layer_last_row"], 1e-5, 1e-4)
    expected = fixture.outputs["last_hidden_state"]
    if (
        expected.shape[1] == embeds.shape[1]
    ):  # mask mode: outputs at kept positions are equal, dropped ones are not read
        text = [i for i in range(embeds.shape[1]) if not start <= i < start + count]
        expected = expected[:, sorted([*text, *(kept + start).tolist()])]
    yield relative("last_hidden_state", prefill.hidden_states[-1], expected, 1e-3, 1e-4)
