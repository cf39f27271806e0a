"""LLaVA-OneVision: tiles resized to at most nine crops' worth of tokens, several plain images, pooled video frames.

Source: Li et al., "LLaVA-OneVision: Easy Visual Task Transfer", TMLR 2025; transformers ``models/llava_onevision``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vislm.lmm.adapters.base import Grid
from vislm.lmm.adapters.llava_next import LlavaNextAdapter


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """Names the parts of a LLaVA-OneVision model (SigLIP tower, no CLS)."""

    family = "llava_onevision"
    default_prompt = "<|im_start|>user {images}\n{question}<|im_end|><|im_start|>assistant\n"
    nested_images = True
    mixers = ("pack_image_features", "apply_pooling")

    def crops(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the crops of every image (1 where a prompt holds several), or the frames of every video."""
        videos = arguments.get("pixel_values_videos")
        if videos is not None:
            return [videos.shape[1]] * videos.shape[0]
        sizes, numbers = arguments["image_sizes"], arguments.get("batch_num_images")
        tiled = [True] * len(sizes) if numbers is None else [int(n) == 1 for n in numbers for _ in range(int(n))]
        return [self._crops_of(size) if own else 1 for size, own in zip(sizes, tiled, strict=False)]

    def pack(self, maps: Tensor | Sequence[Tensor], arguments: Mapping[str, Any], entry: int, newline: float) -> Tensor:
        """Return (n, c) by the model's own packing; a video's frames are pooled, and one newline ends it."""
        if arguments.get("pixel_values_videos") is None:
            return super().pack(maps, arguments, entry, newline)
        stacked = maps if isinstance(maps, Tensor) else torch.stack(list(maps))
        pooled = self.inner.apply_pooling(stacked).flatten(0, 1)
        return torch.cat([pooled, pooled.new_full((1, pooled.shape[-1]), newline)])

    def spans(self, arguments: Mapping[str, Any]) -> list[tuple[int, int, int] | None]:
        """Return (frames, rows, columns) of every video; None for images."""
        videos = arguments.get("pixel_values_videos")
        if videos is None:
            return super().spans(arguments)
        assert self.patch_grid is not None
        side = math.ceil(self.patch_grid[0] / 2)
        return [(videos.shape[1], side, side)] * videos.shape[0]

    def grids(self, features: Tensor, span: tuple[int, int, int] | None = None) -> list[Grid]:
        """Return base view and tile grid of an image, or one rectangle per frame of a video."""
        if span is None:
            return super().grids(features)
        frames, rows, columns = span
        return [Grid(rows, columns, frame * rows * columns, columns) for frame in range(frames)]

    def _pack_options(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"vision_aspect_ratio": arguments.get("vision_aspect_ratio") or self.config.vision_aspect_ratio}
