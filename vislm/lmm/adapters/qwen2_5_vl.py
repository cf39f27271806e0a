"""Qwen2.5-VL: Qwen2-VL with window attention in most tower layers.

Source: Bai et al., "Qwen2.5-VL Technical Report", 2025, arXiv 2502.13923; transformers ``models/qwen2_5_vl``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from vislm.errors import PlanConflict
from vislm.lmm.adapters.qwen2_vl import Qwen2VLAdapter
from vislm.lmm.cost.flops import TowerShape


class Qwen25VLAdapter(Qwen2VLAdapter):
    """Names the parts of a Qwen2.5-VL model."""

    family = "qwen2_5_vl"
    tower_conflict = (
        "Qwen2.5-VL's tower sorts its rows by attention windows and, behind the merger, sorts them back by an index of "
        "the full length; prune behind the tower or in the language model instead (flowcut: where='language')"
    )

    @property
    def tower_shape(self) -> TowerShape:
        """Sizes; the MLP is gated."""
        vision = self.vision_config
        return self._shape(vision.hidden_size, vision.intermediate_size, vision.out_hidden_size, mlp_matrices=3)

    def tower_segments(self, arguments: Mapping[str, Any]) -> list[list[int]]:
        """Return the patches of every window, or of every frame in the blocks with full attention."""
        frames = super().tower_segments(arguments)
        _, bounds = self._windows(arguments["grid_thw"])
        windows = bounds.diff().tolist()
        return [f if n in self.vision_config.fullatt_block_indexes else windows for n, f in enumerate(frames)]

    def check_tower_signal(self, layer: int) -> None:
        """Raise ``PlanConflict`` for a block that attends within windows."""
        super().check_tower_signal(layer)
        full = list(self.vision_config.fullatt_block_indexes)
        if layer not in full:
            raise PlanConflict(
                f"tower layer {layer} of Qwen2.5-VL sees single windows; take the signal at one of {full}"
            )

    def pack(self, maps: Tensor | Sequence[Tensor], arguments: Mapping[str, Any], entry: int, newline: float) -> Tensor:
        """Return (n, c): the mean of every 2 x 2 cell, sorted back from the order of the windows."""
        cells = super().pack(maps, arguments, entry, newline)
        thw = torch.tensor([self._thw(arguments)[entry]])
        order, _ = self._windows(thw)
        return cells[torch.argsort(order).to(cells.device)]

    def _windows(self, thw: Tensor) -> tuple[Tensor, Tensor]:
        vision = self.vision_config
        index, bounds = get_vision_window_index(thw, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        return index, torch.unique_consecutive(torch.as_tensor(bounds))
