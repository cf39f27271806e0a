"""An explicit eager decoder: whole attention matrices of a tiny LLaVA, to compare recordings and edits with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Edit = Callable[[Tensor, int], Tensor]
"""Gets the masked logits (B, H, Q, K) and the layer; returns new ones."""


def forward(model: Any, inputs: dict[str, Any], edit: Edit | None = None) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the logits (B, T, V) of a whole sequence and the weights (B, H, T, T) of every layer."""
    from transformers.models.llama import modeling_llama

    original, found = modeling_llama.eager_attention_forward, {}

    def attention(module, query, key, value, mask, scaling, **kwargs):
        key = modeling_llama.repeat_kv(key, module.num_key_value_groups)
        value = modeling_llama.repeat_kv(value, module.num_key_value_groups)
        logits = query @ key.transpose(2, 3) * scaling + mask
        if edit is not None:
            logits = edit(logits, module.layer_idx)
        found[module.layer_idx] = logits.softmax(-1)
        return (found[module.layer_idx] @ value).transpose(1, 2).contiguous(), None

    model.set_attn_implementation({"text_config": "eager"})
    modeling_llama.eager_attention_forward = attention
    try:
        with torch.no_grad():
            mask = inputs.get("attention_mask")
            mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
            return model(**{**inputs, "attention_mask": mask}, use_cache=False).logits, found
    finally:
        modeling_llama.eager_attention_forward = original
        model.set_attn_implementation({"text_config": "sdpa"})
