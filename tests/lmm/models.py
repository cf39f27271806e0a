"""Tiny random models of every supported family, built from configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

IMAGE_TOKEN = 63
PATCHES = 16


def configs(kv_heads: int = 2, layers: int = 5, heads: int = 4) -> tuple[CLIPVisionConfig, LlamaConfig]:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=64,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return vision, text


def llava(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> LlavaForConditionalGeneration:
    vision, text = configs(**options)
    torch.manual_seed(seed)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    return _finish(LlavaForConditionalGeneration(config), dtype)


def llava_next(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> LlavaNextForConditionalGeneration:
    vision, text = configs(**options)
    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    return _finish(LlavaNextForConditionalGeneration(config), dtype)


def _finish(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    with torch.no_grad():
        for name, p in model.named_parameters():  # larger than the default 0.02, so that attention is not uniform
            if p.dim() > 1 and "embed" not in name:
                p.mul_(8.0)
            elif "embed" in name or name.endswith("image_newline"):
                p.normal_(0, 1.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def prompt(*words: int, tokens: int = PATCHES, images: int = 1) -> torch.Tensor:
    """A prompt: BOS, two words, the images' placeholders (adjacent), the given words."""
    return torch.tensor([[1, 5, 6, *[IMAGE_TOKEN] * (tokens * images), *words]])


def left_pad(*prompts: torch.Tensor) -> dict[str, torch.Tensor]:
    width = max(p.shape[1] for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, p in enumerate(prompts):
        ids[row, width - p.shape[1] :] = p[0]
        mask[row, width - p.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pixels(count: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
