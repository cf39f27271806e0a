"""LLaVA-NeXT (1.6): a base view and a grid of tiles, whose rows end in a newline token.

Source: Liu et al., "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge", 2024; transformers
``models/llava_next``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vislm.lmm.adapters.base import Grid
from vislm.lmm.adapters.llava import LlavaAdapter


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

    def grids(self, features: Tensor, span: tuple[int, int, int] | None = None) -> list[Grid]:
        """Return the base view's grid and, when there are tiles, the unpadded tile grid."""
        assert self.patch_grid is not None
        height, width = self.patch_grid
        base = [Grid(height, width, start=0, row_stride=width)]
        tail = self.is_patch(features)[height * width :]
        breaks = (~tail).nonzero().flatten()
        if len(tail) <= 1 or not len(breaks):
            return base
        row = int(breaks[0]) + 1
        return [*base, Grid(len(tail) // row, row - 1, start=height * width, row_stride=row)]

    def crops(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the base view and the tiles of every image, counted from its size."""
        return [self._crops_of(size) for size in arguments["image_sizes"]]

    def pack(self, maps: Tensor | Sequence[Tensor], arguments: Mapping[str, Any], entry: int, newline: float) -> Tensor:
        """Return (n, c) by the model's own ``pack_image_features``."""
        stacked = maps if isinstance(maps, Tensor) else torch.stack(list(maps))
        value = stacked.new_full(stacked.shape[-1:], newline)
        packed, _ = self.inner.pack_image_features(
            [stacked], arguments["image_sizes"][entry : entry + 1], image_newline=value, **self._pack_options(arguments)
        )
        return packed[0]

    def _pack_options(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        strategy = arguments.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        return {"vision_feature_select_strategy": strategy}

    def _crops_of(self, size: Any) -> int:
        return image_size_to_num_patches(size, self.config.image_grid_pinpoints, self.vision_config.image_size)
