"""An untrained LLaVA with the true sizes of LLaVA-1.5-7B but few decoder layers: for speed and memory only."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vislm.lmm.interventions import Intervention
from vislm.lmm.run import Run
from vislm.lmm.session import attach

PATCHES = 576
TEXT_TOKENS = 60
IMAGE_TOKEN = 32000


def build_llava(layers: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """Return the model: CLIP-L/14 at 336 pixels (24 layers x 1024, 576 patches), ``layers`` decoder layers x 4096."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=True)
    config.image_token_id = IMAGE_TOKEN
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model = model.to(dtype).to_empty(device="cpu")  # pyright: ignore[reportArgumentType]
    _fill(model, torch.Generator().manual_seed(seed))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@torch.no_grad()
def _fill(model: LlavaForConditionalGeneration, generator: torch.Generator) -> None:
    """Random matrices, unit norms, and the buffers that a meta model lacks."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            for name, parameter in module.named_parameters(recurse=False):
                parameter.fill_(float(name == "weight"))
        else:
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.03, generator=generator)
                else:
                    parameter.zero_()
    tower = model.model.vision_tower
    tower.embeddings.position_ids.copy_(torch.arange(tower.embeddings.num_positions)[None])
    rotary = model.model.language_model.rotary_emb
    fresh = type(rotary)(model.config.text_config)
    rotary.inv_freq.copy_(fresh.inv_freq)
    rotary.original_inv_freq = fresh.inv_freq.clone()


def photo_inputs(photo: Image.Image, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the inputs for one photograph: 576 placeholders among 60 text tokens."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    pixels = processor(images=photo, return_tensors="pt")["pixel_values"].to(dtype)
    words = torch.randint(3, 31000, (TEXT_TOKENS,), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([words[:35], torch.full((PATCHES,), IMAGE_TOKEN), words[35:]]).unsqueeze(0)
    return {"input_ids": ids, "pixel_values": pixels}


@dataclass(frozen=True)
class Timing:
    """One method on the true shape: medians over several prefills."""

    label: str
    run: Run
    tower_seconds: float
    prefill_seconds: float
    kv_bytes: int


def time_prefill(
    model: LlavaForConditionalGeneration,
    inputs: dict[str, Any],
    label: str,
    methods: tuple[Intervention, ...],
    runs: int,
) -> Timing:
    """Time tower and prefill of one new token; the first run warms up and does not count."""
    seen: list[Run] = []
    with torch.no_grad(), attach(model, *methods) as session:
        for _ in range(runs + 1):
            model.generate(**inputs, max_new_tokens=1, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
            assert session.last_run is not None
            seen.append(session.last_run)
    counted = seen[1:]
    last = counted[-1]
    tower = median(r.seconds["tower"] for r in counted)
    prefill = median(r.seconds["prefill"] for r in counted)
    last.seconds.update(tower=tower, prefill=prefill)
    return Timing(label, last, tower, prefill, last.kv_bytes)
