"""Qwen3-VL: Qwen2-VL whose first decoder layers add features of several tower depths (deepstack).

Source: Qwen team, "Qwen3-VL Technical Report", 2025, arXiv 2511.21631; transformers ``models/qwen3_vl``.
"""

from __future__ import annotations

from typing import Any

from vislm.lmm.adapters.qwen2_vl import Qwen2VLAdapter
from vislm.lmm.cost.flops import TowerShape


class Qwen3VLAdapter(Qwen2VLAdapter):
    """Names the parts of a Qwen3-VL model."""

    family = "qwen3_vl"
    tower_conflict = (
        "Qwen3-VL's deepstack mergers read whole 2 x 2 cells of several tower layers, which must all have the same "
        "length; prune behind the tower or in the language model instead (flowcut: where='language')"
    )

    @property
    def deepstack(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """One decoder layer for every tower depth that is read."""
        return len(self.vision_config.deepstack_visual_indexes)

    @property
    def tower_shape(self) -> TowerShape:
        """Sizes; every deepstack merger costs as much as the last one."""
        vision: Any = self.vision_config
        width, out = vision.hidden_size, vision.out_hidden_size
        return self._shape(width, vision.intermediate_size, out, mergers=1 + self.deepstack)
