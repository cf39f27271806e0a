"""A random model with the sizes of LLaVA-OneVision-0.5B, and a prompt with one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaOnevisionForConditionalGeneration
from transformers.initialization import no_init_weights

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter, adapter_for
from vislm.lmm.prompt.image_layout import ImageLayout, default_processor, published_config

SHAPE = "llava-onevision-0.5b"
ONE_CROP = 729
"""Visual tokens of a single crop, as OneVision sees each of several images: no tiles, no newlines."""
TEXT_TOKENS = 60
_PIXELS = 384
"""Side of the shape's crops."""


@dataclass(frozen=True)
class Subject:
    """A model and the prompt that it is measured with."""

    model: Any
    inputs: dict[str, Tensor]
    visual_tokens: int
    crops: int

    @property
    def adapter(self) -> Adapter:
        """The model's adapter."""
        return adapter_for(self.model)


def build(
    tokens: int = ONE_CROP,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tower_layers: int | None = None,
    layers: int | None = None,
    **sizes: Any,
) -> Subject:
    """Return a model with random weights and its prompt.

    SigLIP-so400m (26 of its 27 layers, 1152 wide, 729 patches of a 384-pixel crop) and Qwen2-0.5B (24 layers, 896
    wide, 14 heads, 2 of them for keys and values, MLP 4864, 151936 words), between them two layers of projector.

    Args:
        tokens: 729 for one crop (a plain LLaVA), or more for a picture in tiles that gives the nearest possible number.
        dtype: of the weights.
        device: where to put them.
        tower_layers: fewer layers of the tower.
        layers: fewer decoder layers.
        sizes: other changes: ``vision_*`` to the tower's configuration, ``text_*`` to the language model's.

    Raises:
        UsageError: fewer tokens than one crop has.
    """
    config = published_config(SHAPE)
    changes = {"vision_num_hidden_layers": tower_layers, "text_num_hidden_layers": layers, **sizes}
    for name, value in changes.items():
        part, _, key = name.partition("_")
        if value is not None:
            setattr(getattr(config, f"{part}_config"), key, value)
    pixels = config.vision_config.image_size
    config.image_grid_pinpoints = [[n * pixels // _PIXELS for n in point] for point in config.image_grid_pinpoints]
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    side = pixels // config.vision_config.patch_size
    if tokens < side * side:
        raise UsageError(f"tokens={tokens}: one crop has {side * side} visual tokens; give {side * side} or more")
    tiled = tokens > side * side
    model = (
        _random(LlavaOnevisionForConditionalGeneration, config, dtype, device)
        if tiled
        else _plain(config, dtype, device)
    )
    adapter = adapter_for(model)
    if not tiled:
        inputs: dict[str, Tensor] = {"pixel_values": torch.randn(1, 3, pixels, pixels)}
        layout = ImageLayout.of(adapter, None, (pixels, pixels))
    else:
        width, height = 2 * pixels, _height(adapter, pixels, tokens)
        layout = ImageLayout.of(adapter, default_processor(adapter), (width, height))
        inputs = {
            "pixel_values": torch.randn(1, len(layout.crops), 3, pixels, pixels),
            "image_sizes": torch.tensor([[height, width]]),
        }
    words = torch.randint(3, 1000, (TEXT_TOKENS,))
    half = TEXT_TOKENS // 2
    ids = torch.cat([words[:half], torch.full((layout.tokens,), config.image_token_id), words[half:]])
    inputs |= {"input_ids": ids[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    placed = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    return Subject(model, placed, layout.tokens, len(layout.crops))


def _plain(config: Any, dtype: torch.dtype, device: str) -> Any:
    plain = LlavaConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=config.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    return _random(LlavaForConditionalGeneration, plain, dtype, device)


def _random(cls: Any, config: Any, dtype: torch.dtype, device: str) -> Any:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with no_init_weights(), torch.device(device):  # the library's own initialisation takes long at this size
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("image_newline"):
                parameter.normal_(0.0, 0.03)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def _height(adapter: Adapter, pixels: int, tokens: int) -> int:
    """Return the height of a picture, two crops wide, whose visual tokens are nearest to ``tokens``."""
    processor = default_processor(adapter)
    heights = range(pixels // 4, 2 * pixels + 1, max(1, pixels // 32))
    return min(heights, key=lambda h: abs(ImageLayout.of(adapter, processor, (2 * pixels, h)).tokens - tokens))
