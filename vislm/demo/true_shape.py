"""An untrained LLaVA with LLaVA-1.5-7B's true sizes but few decoder layers: for speed and memory, not for answers."""

from __future__ import annotations

import time
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

from vislm.errors import UsageError

PATCHES = 576
TEXT_TOKENS = 60
"""Words of a prompt of usual length around the image."""
IMAGE_TOKEN = 32000
_PROBE = 768
"""Side of the matrices that tell the faster dtype."""
_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_DECODER = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def build_llava(
    layers: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tower: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
) -> LlavaForConditionalGeneration:
    """Return a random model: CLIP-L/14 at 336 pixels (24 layers x 1024, 576 patches), ``layers`` layers x 4096.

    Args:
        layers: decoder layers (the true model has 32).
        seed: of the weights.
        dtype: of the weights; 3 layers take 4.2 GB in float32.
        tower: changes to the tower's configuration, e.g. for tests.
        decoder: changes to the language model's.

    Raises:
        UsageError: fewer than one layer.
    """
    config = llava_config(layers, tower, decoder)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with no_init_weights():  # the library's own initialisation takes minutes at this size
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    _fill(model, torch.Generator().manual_seed(seed))
    return model.eval()


def llava_config(
    layers: int, tower: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None
) -> LlavaConfig:
    """Return the configuration of :func:`build_llava`; arguments and errors as there."""
    if layers < 1:
        raise UsageError(f"layers={layers}: expected 1 to 32 decoder layers")
    vision = CLIPVisionConfig(**{**_TOWER, **(tower or {})})
    text = LlamaConfig(**{**_DECODER, "num_hidden_layers": layers, **(decoder or {})})
    # one matrix for embedding and output head halves the time to fill them
    config = LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=True)
    config.image_token_id = IMAGE_TOKEN
    return config


@torch.no_grad()
def _fill(model: LlavaForConditionalGeneration, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("class_embedding"):
            parameter.normal_(0.0, 0.03, generator=generator)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where this CPU multiplies it faster than float32, else float32."""
    return min((torch.bfloat16, torch.float32), key=_matmul_seconds)


def _matmul_seconds(dtype: torch.dtype) -> float:
    matrix, product = torch.ones(_PROBE, _PROBE, dtype=dtype), torch.empty(_PROBE, _PROBE, dtype=dtype)
    torch.mm(matrix, matrix, out=product)  # the first product sets up the library
    started = time.perf_counter()
    for _ in range(3):
        torch.mm(matrix, matrix, out=product)
    return time.perf_counter() - started


def image_processor() -> CLIPImageProcessor:
    """Return LLaVA-1.5's image processor: short side to 336 pixels, centre cropped."""
    return CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})


def photo_inputs(photo: Image.Image, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the inputs for one photograph: 576 placeholders among 60 text tokens."""
    pixels = image_processor()(images=photo, return_tensors="pt")["pixel_values"].to(dtype)
    words = torch.randint(3, 31000, (TEXT_TOKENS,), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([words[:35], torch.full((PATCHES,), IMAGE_TOKEN), words[35:]]).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
