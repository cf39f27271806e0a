"""Head methods against explicit eager attention with whole matrices."""

from __future__ import annotations

from collections.abc import Callable

import models
import torch
from running import generate, one_image
from torch import Tensor

Edit = Callable[[Tensor, Tensor, int], Tensor]
"""Gets logits (B, H, T, T) before masking, the additive mask, and the layer; returns weights."""


def plain(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
    return (logits + mask).softmax(-1)


def eager_logits(model, inputs: dict, ids: Tensor, edit: Edit) -> Tensor:
    """Next-token logits (B, V) of a whole sequence, without a cache."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.eager_attention_forward

    def forward(module, query, key, value, mask, scaling, **kwargs):
        key = modeling_llama.repeat_kv(key, module.num_key_value_groups)
        value = modeling_llama.repeat_kv(value, module.num_key_value_groups)
        weights = edit(query @ key.transpose(2, 3) * scaling, mask, module.layer_idx)
        return (weights @ value).transpose(1, 2).contiguous(), None

    model.set_attn_implementation({"text_config": "eager"})
    modeling_llama.eager_attention_forward = forward
    try:
        with torch.no_grad():
            mask = torch.ones_like(ids)
            return model(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits[:, -1]
    finally:
        modeling_llama.eager_attention_forward = original
        model.set_attn_implementation({"text_config": "sdpa"})


class Prompt:
    """Where one image lies in the tiny model's prompt: keys [start, end) of ``length``."""

    start, end, length = 3, 3 + models.PATCHES, 3 + models.PATCHES + 3

    @classmethod
    def image(cls, keys: int) -> Tensor:
        columns = torch.arange(keys)
        return (columns >= cls.start) & (columns < cls.end)


def check_against_eager(method, edit: Edit, steps: int = 8, model=None) -> None:
    """Compare the session's logits, prefill and decode steps, with those of explicit matrices, and see an effect."""
    model, inputs = model or models.llava(), one_image("llava")
    untouched, _, _ = generate(model, inputs, max_new_tokens=steps)
    logits, out, _ = generate(model, inputs, method, max_new_tokens=steps)
    for step in range(steps):
        expected = eager_logits(model, inputs, out.sequences[:, : Prompt.length + step], edit)
        scale = expected.abs().max()
        assert (logits[step] - expected).abs().max() <= 1e-5 * scale, f"step {step}"
    assert (logits - untouched).abs().max() > 1e-3
