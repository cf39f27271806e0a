"""SPIN: keep, at every step, the heads that look most at the image and suppress the others.

Source: Sarkar et al., "Mitigating Hallucinations in Vision-Language Models through Image-Guided Head Suppression",
EMNLP 2025, arXiv 2505.16411; github.com/YUECHE77/SPIN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.interventions import EditStage, EditView


def image_score(values: Tensor, image: Tensor) -> Tensor:
    """Return (B, H, R): the sum of logits or weights (B, H, R, K) over the image keys (B, K) bool."""
    return (values @ image[:, None, :, None].to(values.dtype)).squeeze(-1)


def head_factors(score: Tensor, keep_ratio: float, suppressed_scale: float) -> Tensor:
    """Return (B, H, R): 1 for the floor(keep_ratio H) heads with the highest score (B, H, R), else the scale.

    Ties go to the lower head.
    """
    best = score.argsort(dim=1, descending=True, stable=True)[:, : math.floor(keep_ratio * score.shape[1])]
    return torch.full_like(score, suppressed_scale).scatter(1, best, 1.0)


@dataclass(frozen=True)
class SPIN:
    """Multiply the last row's output of all but the most image-attentive heads by ``suppressed_scale``."""

    keep_ratio: float = 0.95
    """Share of the heads that are left alone."""
    suppressed_scale: float = 0.08
    layers: tuple[int, ...] | None = None
    """Decoder layers, 0-based; None: all."""
    score: Literal["logits_code", "attention_paper"] = "logits_code"
    """What is summed over the image: the logits before the softmax, as coded, or the weights, as the paper says."""
    name = "spin"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return one edit stage; none when all heads are kept or the scale is 1."""
        if not 0.0 <= self.keep_ratio <= 1.0:
            raise UsageError(f"keep_ratio={self.keep_ratio}: expected a share of the heads in [0, 1]")
        if not 0.0 <= self.suppressed_scale < math.inf:
            raise UsageError(f"suppressed_scale={self.suppressed_scale}: expected a finite factor >= 0")
        layers = frozenset(range(len(adapter.layers)) if self.layers is None else self.layers)
        if self.keep_ratio == 1.0 or self.suppressed_scale == 1.0 or not layers:
            return []
        return [EditStage(layers, self.edit)]

    def edit(self, view: EditView) -> Tensor:
        """Return the rows' weights (B, H, R, K); those of a suppressed head sum to ``suppressed_scale``."""
        weights = view.softmax()
        measured = view.logits if self.score == "logits_code" else weights
        factors = head_factors(image_score(measured, view.keys.image), self.keep_ratio, self.suppressed_scale)
        return weights * factors.unsqueeze(-1)


METHOD = SPIN
