"""PAI: raise the last row's attention logits on the image, and move the answer away from the text-only one.

Source: Liu et al., "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs",
ECCV 2024, arXiv 2407.21771; github.com/LALBJ/PAI. The paper's layer prior is the first layer that is edited.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.layer_ranges import chosen_layers
from vislm.lmm.interventions import EditStage, EditView, LogitsStage, LogitsView


def boost(logits: Tensor, image: Tensor, alpha: float) -> Tensor:
    """Return attention logits S + alpha |S| on the image keys, S elsewhere.

    Args:
        logits: (B, H, R, K) before the softmax. A negative one moves towards zero: the edit is no constant bias.
        image: (B, K) bool.
        alpha: strength.
    """
    return torch.addcmul(logits, image[:, None, None].to(logits.dtype), logits.abs(), value=alpha)


def guide(logits: Tensor, text_only_logits: Tensor, gamma: float, cutoff: float = 0.1) -> Tensor:
    """Return next-token scores gamma (lc - lu) + lu of log-probabilities lc with and lu without the image.

    Tokens whose probability with the image is below ``cutoff`` times the largest become -inf. gamma = 1 gives lc.

    Args:
        logits: (..., V) with the image.
        text_only_logits: (..., V) of the prompt without it.
        gamma: strength of the guidance.
        cutoff: share of the largest probability.
    """
    with_image, without = logits.float().log_softmax(-1), text_only_logits.float().log_softmax(-1)
    if gamma == 1.0:
        return with_image
    scores = gamma * (with_image - without) + without
    if cutoff == 0.0:
        return scores
    least = with_image.max(-1, keepdim=True).values + math.log(cutoff)
    return scores.masked_fill(with_image < least, -torch.inf)


@dataclass(frozen=True)
class PAI:
    """Edit the last row in every head of the layers; with ``gamma`` other than 1, guide the next token as well."""

    alpha: float = 0.2
    gamma: float = 1.1
    """Of the text-only guidance; 1 leaves it out."""
    layers: tuple[int, ...] | None = None
    """Decoder layers, 0-based; None: 2-31 of every 32."""
    cutoff: float = 0.1
    """Tokens less likely than this share of the likeliest are ruled out by the guidance."""
    name = "pai"

    def plan(self, adapter: Adapter) -> Sequence[EditStage | LogitsStage]:
        """Return an edit stage unless alpha is 0, and a logits stage unless gamma is 1."""
        if not 0.0 <= self.alpha < math.inf:
            raise UsageError(f"alpha={self.alpha}: expected a finite number >= 0 (0 changes nothing)")
        if not 0.0 <= self.gamma < math.inf or not 0.0 <= self.cutoff < 1.0:
            raise UsageError(
                f"gamma={self.gamma}, cutoff={self.cutoff}: expected gamma >= 0 (1: none), cutoff in [0, 1)"
            )
        stages: list[EditStage | LogitsStage] = []
        layers = chosen_layers(self.layers, len(adapter.layers), 2, 32)
        if self.alpha and layers:
            stages.append(EditStage(layers, self.edit))
        if self.gamma != 1.0:
            stages.append(LogitsStage(self.adjust, contrast="text_only"))
        return stages

    def edit(self, view: EditView) -> Tensor:
        """Return the rows' weights (B, H, R, K) after the boost."""
        return view.softmax(boost(view.logits, view.keys.image, self.alpha))

    def adjust(self, view: LogitsView) -> Tensor:
        """Return the guided scores (B, V); samples without an image keep their logits."""
        assert view.contrast is not None
        guided = guide(view.logits, view.contrast, self.gamma, self.cutoff)
        return torch.where(view.has_image[:, None], guided, view.logits)


METHOD = PAI
