"""VHR: amplify, per sample, the heads whose output changes most when the image is taken away.

Source: He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025, arXiv
2412.13949; github.com/jinghan1he/VHR. Written from the paper; what it leaves open is an option here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.interventions import HeadStage, HeadView

Std = Literal["sample", "population"]


def divergence(image_output: Tensor, text_only_output: Tensor, squared: bool = False) -> Tensor:
    """Return VHD = ||a - u||_2 over head outputs (..., H, d), shape (..., H), in float32."""
    difference = (image_output.float() - text_only_output.float()).square().sum(-1)
    return difference if squared else difference.sqrt()


def text_norm(text_only_output: Tensor) -> Tensor:
    """Return TA = ||u||_2^2 over head outputs (..., H, d), shape (..., H), in float32."""
    return text_only_output.float().square().sum(-1)


def outliers(vhd: Tensor, text_activity: Tensor, std: Std = "sample") -> Tensor:
    """Return (..., H) bool: heads that surge when the image is gone.

    Both VHD and TA lie more than one standard deviation above their mean over the layer's heads.
    """

    def high(x: Tensor) -> Tensor:
        return x > x.mean(-1, keepdim=True) + x.std(-1, correction=1 if std == "sample" else 0, keepdim=True)

    return high(vhd) & high(text_activity)


def select_heads(vhd: Tensor, outlier: Tensor | None = None) -> Tensor:
    """Return (..., H) bool: heads above the layer's median divergence, outliers counting as zero."""
    if outlier is not None:
        vhd = vhd.masked_fill(outlier, 0.0)
    return vhd > vhd.median(-1, keepdim=True).values


def token_divergence(vhd: Tensor, k: int) -> Tensor:
    """Return T-VHD: the sum over layers of the k largest VHD (L, H) of each, for one generation step."""
    return vhd.topk(k, dim=-1).values.sum()


@dataclass(frozen=True)
class VHR:
    """Multiply the selected heads' outputs by ``alpha`` at every position of the prefill and at every later step."""

    alpha: float = 2.0
    layers: tuple[int, ...] | None = None
    """Decoder layers, 0-based; None: the second layer and the last 14 of every 32."""
    text_stream: Literal["both", "image_only"] = "both"
    """Whether the text-only prompt carries the reinforcement of earlier layers too."""
    outlier_rule: bool = True
    std: Std = "sample"
    squared: bool = False
    name = "vhr"

    def plan(self, adapter: Adapter) -> Sequence[HeadStage]:
        """Return one head stage; none when alpha is 1."""
        if not 0.0 <= self.alpha < float("inf"):
            raise UsageError(f"alpha={self.alpha}: expected a finite factor >= 0 (1 changes nothing)")
        if self.alpha == 1.0:
            return []
        depth = len(adapter.layers)
        layers = default_layers(depth) if self.layers is None else frozenset(self.layers)
        return [HeadStage(layers, self._scale, self.text_stream)]

    def _scale(self, view: HeadView) -> Tensor | None:
        if view.phase == "prefill":
            assert view.text_only_output is not None
            vhd = divergence(view.image_output, view.text_only_output, self.squared)
            outlier = outliers(vhd, text_norm(view.text_only_output), self.std) if self.outlier_rule else None
            selected = select_heads(vhd, outlier) & view.has_image[:, None]
            view.memory.setdefault("vhd", {})[view.layer] = vhd
            view.memory.setdefault("selected", {})[view.layer] = selected
            view.memory.setdefault("factors", {})[view.layer] = torch.where(selected, self.alpha, 1.0)
        return view.memory["factors"][view.layer]


def default_layers(depth: int) -> frozenset[int]:
    """Return the published layers for LLaVA, {1} and the last 14 of 32, scaled to ``depth`` layers."""
    return frozenset({min(1, depth - 1)} | set(range(round(depth * 18 / 32), depth)))


METHOD = VHR
