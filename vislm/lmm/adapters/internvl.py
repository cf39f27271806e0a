"""InternVL (transformers' own format, ``-hf`` checkpoints): tiles of one size and a thumbnail, pixel shuffle.

Source: Zhu et al., "InternVL3: Exploring Advanced Training and Test-Time Recipes for Open-Source Multimodal Models",
2025, arXiv 2504.10479; transformers ``models/internvl``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vislm.lmm.adapters.base import Adapter, Grid
from vislm.lmm.choosing.tokens import check_lengths, number_images
from vislm.lmm.cost.flops import TowerShape


class InternVLAdapter(Adapter):
    """Names the parts of an InternVL model. Every tile is encoded alone; a run of placeholders is one image."""

    family = "internvl"
    default_prompt = "<|im_start|>user\n{images}\n{question}<|im_end|>\n<|im_start|>assistant\n"
    tower_conflict = (
        "InternVL joins squares of the full patch grid behind the tower (pixel shuffle); prune behind the projector or "
        "in the language model instead (flowcut: where='language')"
    )

    @property
    def tower_layers(self) -> list[nn.Module]:
        """The tower's encoder layers, first to last."""
        return list(self.inner.vision_tower.encoder.layer)

    @property
    def tower_attentions(self) -> list[nn.Module]:
        """The attention module of every tower layer."""
        return [layer.get_submodule("attention") for layer in self.tower_layers]

    @property
    def tower_prefix(self) -> int:
        """One: CLS."""
        return 1

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches of one tile."""
        vision = self.vision_config
        return vision.image_size[0] // vision.patch_size[0], vision.image_size[1] // vision.patch_size[1]

    @property
    def cell(self) -> int:
        """Patches that pixel shuffle joins into one token."""
        return round(1 / self.config.downsample_ratio) ** 2

    @property
    def read_layer(self) -> int:
        """Index of the tower layer whose output the projector reads."""
        layer = self.config.vision_feature_layer
        return (layer if layer >= 0 else len(self.tower_layers) + 1 + layer) - 1

    @property
    def tower_shape(self) -> TowerShape:
        """Sizes; the projector runs on joined patches."""
        vision, out = self.vision_config, self.text_config.hidden_size
        return TowerShape(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            mlp_width=vision.intermediate_size,
            patches=self.patch_grid[0] * self.patch_grid[1],
            prefix=1,
            patch_values=vision.num_channels * vision.patch_size[0] * vision.patch_size[1],
            projector_width=out,
            cell=self.cell,
            projector_weights=vision.hidden_size * self.cell * out + out * out,
        )

    def number(self, input_ids: Tensor, lengths: Mapping[str, list[int]]) -> Tensor:
        """Number runs of placeholders: all tiles of an image stand between one pair of markers."""
        here = input_ids == self.image_token_id
        if "image" in lengths:
            check_lengths(here, lengths["image"])
        return number_images(here, None)

    def crops(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return 1 for every tile."""
        return [1] * len(arguments["pixel_values"])

    def pack(self, maps: Tensor | Sequence[Tensor], arguments: Mapping[str, Any], entry: int, newline: float) -> Tensor:
        """Return (n, c): the mean of the patches that the model's own ``pixel_shuffle`` joins."""
        (own,) = maps
        square = own.unflatten(0, self.patch_grid).unsqueeze(0)
        joined = self.inner.pixel_shuffle(square, scale_factor=self.config.downsample_ratio)
        return joined.flatten(0, 2).unflatten(-1, (self.cell, own.shape[-1])).mean(1)

    def grids(self, features: Tensor, span: tuple[int, int, int] | None = None) -> list[Grid]:
        """Return the rectangle of the last tile, which shows the whole image (the model is not told how tiles lie)."""
        rows, columns = (n // round(self.cell**0.5) for n in self.patch_grid)
        return [Grid(rows, columns, len(features) - rows * columns, columns)]
