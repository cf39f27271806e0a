"""ZeroTuning: rescale the attention on the first token in chosen heads, and with it the sharpness of all the rest.

Source: Han et al., "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training",
ICLR 2026, arXiv 2505.11739. Written from the paper's formulas; there is no released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.artefacts import Factors, Heads, head_factors, head_list
from vislm.lmm.interventions import EditStage, EditView


def bias_first(logits: Tensor, first: Tensor, gamma: Tensor) -> Tensor:
    """Return logits plus ln(gamma) on the first key.

    Their softmax is the paper's gamma a_0 / D there and a_i / D elsewhere, D = (gamma - 1) a_0 + 1.

    Args:
        logits: (B, H, R, K).
        first: (B,) index of the first key that is no padding.
        gamma: (H,) factors.
    """
    place = torch.arange(logits.shape[-1], device=logits.device) == first[:, None]
    return logits + place[:, None, None] * gamma.log()[:, None, None]


@dataclass(frozen=True)
class ZeroTuning:
    """Scale the first valid token's weight in all rows of the chosen heads, at every step, also without an image.

    Factors above 1 flatten the other weights (helps classification), below 1 sharpen them (helps question answering).
    """

    factors: str | Factors | None = None
    """An artefact of kind "factors", or (layer, head, gamma) triples."""
    heads: str | Heads | None = None
    """Instead of ``factors``: an artefact of kind "heads", or (layer, head) pairs, all with the one ``gamma``."""
    gamma: float | None = None
    name = "zerotuning"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return one edit stage; none when all factors are 1 or there are none."""
        factors = {
            layer: {head: gamma for head, gamma in heads.items() if gamma != 1.0}
            for layer, heads in self._factors(adapter).items()
        }
        factors = {layer: heads for layer, heads in factors.items() if heads}
        if not factors:
            return []

        def edit(view: EditView) -> Tensor:
            known = view.memory.setdefault("gamma", {})
            if view.layer not in known:
                known[view.layer] = torch.tensor(list(factors[view.layer].values()), device=view.logits.device)
            return view.softmax(bias_first(view.logits, view.keys.first, known[view.layer]))

        return [EditStage(frozenset(factors), edit, "all", heads=lambda layer: list(factors[layer]), every_sample=True)]

    def _factors(self, adapter: Adapter) -> dict[int, dict[int, float]]:
        if self.factors is not None and self.heads is None and self.gamma is None:
            return head_factors(self.factors, adapter, (self.name,))
        if self.factors is not None or self.heads is None or self.gamma is None:
            raise UsageError(
                "zerotuning needs factors= (a file of vislm calibrate-heads --what zerotuning, or triples such as "
                "3/0/1.5), or heads= and gamma= together"
            )
        if not 0.0 < self.gamma < math.inf:
            raise UsageError(f"gamma={self.gamma}: expected a factor > 0 (1 changes nothing)")
        heads = head_list(self.heads, adapter, (self.name,))
        return {layer: dict.fromkeys(listed, self.gamma) for layer, listed in heads.items()}


METHOD = ZeroTuning
