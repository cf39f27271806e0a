"""PyramidDrop's fixtures: a prefill that loses visual tokens in stages."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vislm.golden.checks._models import prefill_llama
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, exact, relative
from vislm.token_pruning.pyramiddrop import PyramidDrop


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare what is kept, the cache's lengths and the last hidden state."""
    if "inputs_embeds" not in fixture.inputs:
        raise Unhandled(f"inputs {sorted(fixture.inputs)} belong to no known PyramidDrop fixture")
    options, out = fixture.kwargs, fixture.outputs
    method = PyramidDrop(
        ratios=tuple(options["image_token_ratio_list"][1:]),  # the first one is 1: before any stage
        layers=tuple(options["layer_list"]),
    )
    prefill = prefill_llama(fixture, options["image_start"], options["image_tokens"], method)
    if "keep_indices" in out:
        yield exact("keep_indices", torch.tensor(prefill.kept).view(out["keep_indices"].shape), out["keep_indices"])
    yield exact("kv_lengths", prefill.kv_lengths, out["kv_lengths"])
    yield relative("last_hidden_state", prefill.hidden_states[-1], out["last_hidden_state"], 1e-3, 1e-4)
