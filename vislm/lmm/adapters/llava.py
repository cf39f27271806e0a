"""LLaVA-1.5 and every model that transformers builds as ``LlavaForConditionalGeneration``.

Source: Liu et al., "Improved Baselines with Visual Instruction Tuning", CVPR 2024; transformers ``models/llava``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vislm.errors import PlanConflict
from vislm.lmm.adapters.base import Adapter, Grid

__all__ = ["Grid", "LlavaAdapter"]


class LlavaAdapter(Adapter):
    """Names the parts of a LLaVA model; the projector works token by token."""

    family = "llava"
    default_prompt = "USER: {images}\n{question} ASSISTANT:"
    has_token_features = True

    @property
    def tower_layers(self) -> list[nn.Module]:
        """The tower's encoder layers, first to last."""
        for path in ("encoder.layers", "vision_model.encoder.layers"):
            try:
                return list(self.tower.get_submodule(path))  # pyright: ignore[reportArgumentType]
            except AttributeError:
                continue
        raise PlanConflict(f"cannot find the encoder layers of the vision tower {type(self.tower).__name__}")

    @property
    def tower_prefix(self) -> int:
        """1 with a CLIP tower (CLS), else 0."""
        return 1 if self.vision_config.model_type == "clip_vision_model" else 0

    @property
    def patch_grid(self) -> tuple[int, int] | None:
        """Patches of one image or crop; None with Pixtral's tower, which takes images of any size."""
        if self.vision_config.model_type == "pixtral":
            return None
        side = self.vision_config.image_size // self.vision_config.patch_size
        return side, side

    @property
    def crops_per_image(self) -> int | None:
        """One: the whole image."""
        return 1

    @property
    def read_layer(self) -> int:
        """Index of the tower layer whose output the language model reads.

        Raises:
            PlanConflict: the model concatenates several layers, which cannot have different lengths.
        """
        layer = self.config.vision_feature_layer
        if not isinstance(layer, int):
            if len(layer) != 1:
                raise PlanConflict(f"the model reads several tower layers ({layer}); prune after the tower instead")
            layer = layer[0]
        return (layer if layer >= 0 else len(self.tower_layers) + 1 + layer) - 1

    @property
    def keeps_prefix(self) -> bool:
        """Whether CLS stays among the visual tokens (``vision_feature_select_strategy="full"``)."""
        return self.config.vision_feature_select_strategy == "full"

    def crops(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return 1 for every image."""
        return [1] * len(arguments["pixel_values"])

    def pack(self, maps: Tensor | Sequence[Tensor], arguments: Mapping[str, Any], entry: int, newline: float) -> Tensor:
        """Return the one crop's map (n, c)."""
        (own,) = maps
        return self._with_prefix(own, newline)

    def grids(self, features: Tensor, span: tuple[int, int, int] | None = None) -> list[Grid]:
        """Return the one rectangle."""
        if self.patch_grid is None:
            return super().grids(features, span)
        height, width = self.patch_grid
        return [Grid(height, width, start=len(features) - height * width, row_stride=width)]

    def _with_prefix(self, maps: Tensor, value: float) -> Tensor:
        kept = self.tower_prefix if self.keeps_prefix else 0
        return torch.cat([maps.new_full((kept, maps.shape[-1]), value), maps]) if kept else maps
