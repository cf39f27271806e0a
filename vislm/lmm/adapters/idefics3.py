"""Idefics3: tiles between row and column markers, then the whole image; pixel shuffle in the connector.

Source: Laurençon et al., "Building and better understanding vision-language models", 2024, arXiv 2408.12637;
transformers ``models/idefics3``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vislm.lmm.adapters.base import Adapter, Grid
from vislm.lmm.choosing.tokens import check_lengths
from vislm.lmm.cost.flops import TowerShape


class Idefics3Adapter(Adapter):
    """Names the parts of an Idefics3 model. Every tile is encoded alone."""

    family = "idefics3"
    default_prompt = "<|im_start|>User:{images}{question}<end_of_utterance>\nAssistant:"
    nested_images = True
    tower_conflict = (
        "Idefics3 and SmolVLM join squares of the full patch grid behind the tower (pixel shuffle); prune behind the "
        "connector or in the language model instead (flowcut: where='language')"
    )

    @property
    def tower(self) -> nn.Module:
        """The vision tower as the model calls it."""
        return self.inner.vision_model

    @property
    def tower_layers(self) -> list[nn.Module]:
        """The tower's encoder layers, first to last."""
        return list(self.inner.vision_model.encoder.layers)

    @property
    def projector(self) -> nn.Module:
        """The connector."""
        return self.inner.connector

    @property
    def language_model(self) -> Any:
        """The decoder without its head."""
        return self.inner.text_model

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches of one tile."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return side, side

    @property
    def cell(self) -> int:
        """Patches that pixel shuffle joins into one token."""
        return self.config.scale_factor**2

    @property
    def tower_shape(self) -> TowerShape:
        """Sizes; the connector is one matrix on joined patches."""
        vision, out = self.vision_config, self.text_config.hidden_size
        return TowerShape(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            mlp_width=vision.intermediate_size,
            patches=self.patch_grid[0] * self.patch_grid[1],
            prefix=0,
            patch_values=vision.num_channels * vision.patch_size**2,
            projector_width=out,
            cell=self.cell,
            projector_weights=vision.hidden_size * self.cell * out,
        )

    def number(self, input_ids: Tensor, lengths: Mapping[str, list[int]]) -> Tensor:
        """Number the images, each of which ends with the tile that shows all of it.

        The model is not told how many tiles an image has, but the marker in front of that last tile is always the same,
        and the last tile of a prompt is one of them.
        """
        here = input_ids == self.image_token_id
        if "image" in lengths:
            check_lengths(here, lengths["image"])
        starts = here & ~torch.nn.functional.pad(here, (1, 0))[:, :-1]
        image_of = torch.full_like(input_ids, -1)
        number = 0
        for row in range(input_ids.shape[0]):
            columns = starts[row].nonzero().flatten().tolist()
            markers = [int(input_ids[row, c - 1]) if c else -1 for c in columns]
            ends = [*columns[1:], here.shape[1]][: len(columns)]
            for begin, end, marker in zip(columns, ends, markers, strict=True):
                image_of[row, begin:end] = number
                number += marker == markers[-1]
        return image_of.masked_fill(~here, -1)

    def crops(self, arguments: Mapping[str, Any]) -> list[int]:
        """Return 1 for every tile that is not padding (all zero)."""
        return [1] * int(self._real(arguments["pixel_values"].flatten(0, 1)).sum())

    def entry_lengths(self, output: Any) -> list[int]:
        """Return the tokens of every tile; the model lists them sample by sample."""
        rows, columns = self.patch_grid
        tokens = rows * columns // self.cell
        return [tokens] * (sum(len(sample) for sample in output.pooler_output) // tokens)

    def pack(self, maps: Tensor | Sequence[Tensor], arguments: Mapping[str, Any], entry: int, newline: float) -> Tensor:
        """Return (n, c): the mean of the patches that the connector's own ``pixel_shuffle`` joins."""
        (own,) = maps
        joined = self.inner.connector.pixel_shuffle(own.unsqueeze(0), self.config.scale_factor)[0]
        return joined.unflatten(-1, (self.cell, own.shape[-1])).mean(1)

    def grids(self, features: Tensor, span: tuple[int, int, int] | None = None) -> list[Grid]:
        """Return the rectangle of the last tile, which shows the whole image."""
        side = self.patch_grid[0] // self.config.scale_factor
        return [Grid(side, side, len(features) - side * side, side)]

    @staticmethod
    def _real(tiles: Tensor) -> Tensor:
        """Return (K,) bool: tiles (K, 3, H, W) that are encoded."""
        return tiles.flatten(1).ne(0.0).any(1)
