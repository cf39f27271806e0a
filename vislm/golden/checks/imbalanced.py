"""PAINT's fixtures: the two groups of tokens, and one attention layer without rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from vislm.golden.checks._complete import compared
from vislm.golden.fixtures import Comparison, Fixture, Skipped, difference, exact
from vislm.heads import imbalanced
from vislm.lmm.decoder.attention import AttentionCall


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Compare the tokens, the last row of the attention, and the layer's output."""
    yield from compared(fixture, _compare(fixture))


def _compare(fixture: Fixture) -> Iterator[Comparison]:
    inputs, out, options = fixture.inputs, fixture.outputs, fixture.kwargs
    first, penultimate = (inputs[f"vit_attention_{name}"][0, :, 0, 1:].sum(0) for name in ("first", "penultimate"))
    local, summary = imbalanced.select_tokens(first, penultimate, options["local_token_ratio"])
    ratio = torch.tensor(imbalanced.outlier_ratio(penultimate))
    yield difference("outlier_ratio", ratio, out["outlier_ratio"], 1e-6)
    yield exact("local_tokens_sorted", local, out["local_tokens_sorted"])
    yield exact("summary_tokens_by_rank", summary, out["summary_tokens_by_rank"])

    hidden, params = inputs["hidden"], fixture.params
    query, key, value = (
        (hidden @ params[f"{name}_proj.weight"].T).unflatten(-1, (options["num_heads"], -1)).transpose(1, 2)
        for name in "qkv"
    )
    call = AttentionCall(query, key, value, None, True, query.shape[-1] ** -0.5)
    last = torch.tensor([hidden.shape[1] - 1])
    strength = torch.zeros(hidden.shape[1])
    strength[local + options["image_start"]] = options["alpha"]
    strength[summary + options["image_start"]] = options["beta"]
    weights = imbalanced.boost(call.logits(last), strength).softmax(-1)
    heads = scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    heads = torch.cat([heads[:, :-1], call.mix(weights)], 1).flatten(2)
    yield difference("attention_last_row", weights[:, :, 0], out["attention_last_row"], 1e-5)
    yield difference("output", heads @ params["o_proj.weight"].T, out["output"], 1e-5)
