"""Qwen2-VL: images of any size, 2 x 2 patches per token, positions in time, height and width.

Source: Wang et al., "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution", 2024,
arXiv 2409.12191; transformers ``models/qwen2_vl``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vislm.errors import UsageError
from vislm.lmm.adapters.base import Adapter
from vislm.lmm.cost.flops import TowerShape


class Qwen2VLAdapter(Adapter):
    """Names the parts of a Qwen2-VL model."""

    family = "qwen2_vl"
    default_prompt = "<|im_start|>user\n{images}{question}<|im_end|>\n<|im_start|>assistant\n"
    placeholder = "<|vision_start|>{}<|vision_end|>"
    packed_tower = True
    grid_positions = True

    # -- vision tower ------------------------------------------------------------------------------------------------
    @property
    def tower(self) -> nn.Module:
        """The vision tower as the model calls it."""
        return self.inner.visual

    @property
    def tower_layers(self) -> list[nn.Module]:
        """The tower's blocks."""
        return list(self.inner.visual.blocks)

    @property
    def tower_attentions(self) -> list[nn.Module]:
        """The attention of every block; called once for every frame."""
        return [block.get_submodule("attn") for block in self.tower_layers]

    @property
    def projector(self) -> nn.Module:
        """The merger, the last module inside the tower."""
        return self.inner.visual.merger

    @property
    def patch_grid(self) -> tuple[int, int] | None:
        """None: images keep their shape."""
        return None

    @property
    def cell(self) -> int:
        """Four patches, in consecutive rows, are one token."""
        return self.vision_config.spatial_merge_size**2

    @property
    def tower_shape(self) -> TowerShape:
        """Sizes, with the merger as projector."""
        vision = self.vision_config
        return self._shape(vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), vision.hidden_size)

    def _shape(self, width: int, mlp_width: int, out: int, mlp_matrices: int = 2, mergers: int = 1) -> TowerShape:
        vision, joined = self.vision_config, width * self.cell
        return TowerShape(
            layers=vision.depth,
            width=width,
            mlp_width=mlp_width,
            patches=None,
            prefix=0,
            patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            projector_width=out,
            mlp_matrices=mlp_matrices,
            cell=self.cell,
            projector_weights=mergers * (joined * joined + joined * out),
        )

    def tower_segments(self, arguments: Mapping[str, Any]) -> list[list[int]]:
        """Return the patches of every frame, for each block."""
        frames = [rows * columns for time, rows, columns in arguments["grid_thw"].tolist() for _ in range(time)]
        return [frames] * len(self.tower_layers)

    # -- language model ----------------------------------------------------------------------------------------------
    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary (cos, sin), each (B, S, d); of four rows of positions the first is the text's."""
        rows = position_ids[1:] if position_ids.dim() == 3 and position_ids.shape[0] == 4 else position_ids
        return self.language_model.rotary_emb(hidden, position_ids=rows)

    def positions(self, kwargs: Mapping[str, Any], mask: Tensor) -> Tensor:
        """Return (4, B, S): the text's positions and the model's own ``get_rope_index``; (B, S) without images.

        Also leaves the model's cached difference between both as the model's own forward would.
        """
        text = super().positions(kwargs, mask)
        if kwargs.get("image_grid_thw") is None and kwargs.get("video_grid_thw") is None:
            return text
        if kwargs.get("mm_token_type_ids") is None:
            raise UsageError("pass mm_token_type_ids, which the processor returns beside input_ids: positions need it")
        index = self.inner.get_rope_index
        names = [n for n in inspect.signature(index).parameters if kwargs.get(n) is not None and n != "kwargs"]
        grid, self.inner.rope_deltas = index(**{**{n: kwargs[n] for n in names}, "attention_mask": mask})
        return torch.cat([text.unsqueeze(0), grid])

    def counted(self, positions: Tensor) -> Tensor | None:
        """Return the text's positions; a continued cache gets a single row, ahead by the difference the model keeps."""
        if positions.dim() == 3 and positions.shape[0] == 1 and self.inner.rope_deltas is not None:
            return positions[0] - self.inner.rope_deltas
        return super().counted(positions)

    # -- images ------------------------------------------------------------------------------------------------------
    @staticmethod
    def _thw(arguments: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """Return patches (frames, rows, columns) of every image or video."""
        grid = arguments.get("video_grid_thw")
        grid = arguments["image_grid_thw"] if grid is None else grid
        return [(time, rows, columns) for time, rows, columns in grid.tolist()]

    def crops(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return the frames of every image (1) or video."""
        return [time for time, _, _ in self._thw(arguments)]

    def pack(self, maps: Tensor | Sequence[Tensor], arguments: Mapping[str, Any], entry: int, newline: float) -> Tensor:
        """Return (n, c): the mean of every 2 x 2 cell; the tower's rows are ordered cell by cell."""
        return torch.cat(list(maps)).unflatten(0, (-1, self.cell)).mean(1)

    def spans(self, arguments: Mapping[str, Any]) -> list[tuple[int, int, int] | None]:
        """Return (frames, rows, columns) of tokens of every image or video."""
        side = self.vision_config.spatial_merge_size
        return [(time, rows // side, columns // side) for time, rows, columns in self._thw(arguments)]
