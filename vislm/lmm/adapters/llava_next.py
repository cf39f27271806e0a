"""LLaVA-NeXT (1.6): a base view and a grid of tiles, whose rows end in a newline token.

Source: Liu et al., "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge", 2024; transformers
``models/llava_next``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vislm.lmm.adapters.llava import Grid, LlavaAdapter


class LlavaNextAdapter(LlavaAdapter):
    """Names the parts of a LLaVA-NeXT model."""

    family = "llava_next"
    default_prompt = "[INST] {images}\n{question} [/INST]"

    @property
    def crops_per_image(self) -> int | None:
        """None: the number of tiles depends on the image's shape."""
        return None

    def is_patch(self, features: Tensor) -> Tensor:
        """Return (n,) bool: False on newline tokens, which equal the model's learned newline embedding."""
        return ~(features == self.inner.image_newline.to(features)).all(-1)

    def crops(self, arguments: dict[str, Any]) -> list[int]:
        """Return the base view and the tiles of every image."""
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        return [image_size_to_num_patches(size, pinpoints, side) for size in arguments["image_sizes"]]

    def pack(self, maps: Tensor, arguments: dict[str, Any], image: int, newline: float) -> Tensor:
        """Base view first, then the unpadded tile grid with a newline behind each row."""
        strategy = arguments.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        separator = maps.new_full(maps.shape[-1:], newline)
        packed, _ = self.inner.pack_image_features(
            [maps], arguments["image_sizes"][image : image + 1], strategy, separator
        )
        return packed[0]

    def grids(self, features: Tensor) -> list[Grid]:
        """Return the base view's grid and, when there are tiles, the unpadded tile grid."""
        height, width = self.patch_grid
        base = [Grid(height, width, start=0, row_stride=width)]
        tail = self.is_patch(features)[height * width :]
        breaks = (~tail).nonzero().flatten()
        if len(tail) <= 1 or not len(breaks):
            return base
        row = int(breaks[0]) + 1
        return [*base, Grid(len(tail) // row, row - 1, start=height * width, row_stride=row)]
