"""One attention layer of a fixture, with its projections and an identity rotary embedding, under a method's edit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vislm.golden.fixtures import Fixture
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.decoder.key_groups import KeyGroups
from vislm.lmm.interventions import EditView


def edited_layer(fixture: Fixture, phase: str, edit: Callable[[EditView], Tensor | None]) -> tuple[Tensor, Tensor]:
    """Run ``in.hidden_prefill`` or ``in.hidden_decode`` through the layer with its last row edited.

    Reads the projections, ``in.mask_prefill`` (additive; without one: causal), ``in.past_key`` / ``in.past_value``, and
    the kwargs num_heads, image_start, image_end.

    Returns:
        The layer's output (B, Nq, C), and the weights (B, H, Nq, Nk).
    """
    options, inputs = fixture.kwargs, fixture.inputs
    hidden = inputs[f"hidden_{phase}"]
    query, key, value = (_heads(fixture, name, hidden) for name in ("q", "k", "v"))
    prompt, mask = hidden.shape[1], inputs.get("mask_prefill") if phase == "prefill" else None
    if phase == "decode":
        prompt = inputs["past_key"].shape[2]
        key, value = torch.cat([inputs["past_key"], key], 2), torch.cat([inputs["past_value"], value], 2)
    call = AttentionCall(query, key, value, mask, mask is None and phase == "prefill", query.shape[-1] ** -0.5)
    rows = torch.arange(hidden.shape[1])
    weights = call.logits(rows).masked_fill(~call.allowed(rows), -torch.inf).softmax(-1)
    edited = edit(_last_row(call, phase, prompt, options["image_start"], options["image_end"]))
    if edited is not None:
        weights = torch.cat([weights[:, :, :-1], edited], 2)
    output = call.mix(weights).flatten(2) @ fixture.params["o_proj.weight"].T
    return output, weights


def _heads(fixture: Fixture, name: str, hidden: Tensor) -> Tensor:
    """Return a projection of hidden (B, N, C) as (B, H or G, N, d)."""
    width = fixture.params["q_proj.weight"].shape[0] // fixture.kwargs["num_heads"]
    return (hidden @ fixture.params[f"{name}_proj.weight"].T).unflatten(-1, (-1, width)).transpose(1, 2)


def _last_row(call: AttentionCall, phase: str, prompt: int, start: int, end: int) -> EditView:
    batch, keys = call.key.shape[0], call.key.shape[2]
    columns = torch.arange(keys).expand(batch, keys)
    image = (columns >= start) & (columns < end)
    numbers = torch.where(image, torch.arange(batch)[:, None], -1)
    groups = KeyGroups(numbers, torch.where(image, columns - start, -1), torch.ones_like(image), prompt)
    rows = torch.tensor([call.query.shape[2] - 1])
    everyone = torch.ones(batch, dtype=torch.bool)
    return EditView(
        layer=0,
        phase="prefill" if phase == "prefill" else "decode",
        logits=call.logits(rows),
        allowed=call.allowed(rows),
        keys=groups,
        rows=rows,
        row_mask=everyone[:, None],
        has_image=everyone,
        memory={},
    )
