"""AD-HH: stop listed hallucination heads from attending to text, wherever most of their attention goes there.

Source: Yang et al., "Understanding and Mitigating Hallucination in Large Vision-Language Models via Modular Attribution
and Intervention", ICLR 2025; github.com/TianyunYoung/Hallucination-Attribution. The heads are found offline, by the
influence of each on hallucinated against correct object words; LLaVA-1.5-7B's are in configs/heads/ad_hh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.artefacts import Heads, head_list
from vislm.lmm.decoder.logit_scaling import silence_text
from vislm.lmm.interventions import EditStage, EditView


def influence(probability: Tensor, probability_without_head: Tensor, hallucinated: Tensor) -> Tensor:
    """Return (L, H): how much more each head pushes hallucinated object words than correct ones.

    Args:
        probability: (N,) of each object word, untouched model.
        probability_without_head: (N, L, H) of it with that head's output set to zero before the output projection.
        hallucinated: (N,) bool: words that name nothing in the image.

    Raises:
        UsageError: there are no hallucinated or no correct words.
    """
    if not bool(hallucinated.any()) or bool(hallucinated.all()):
        raise UsageError(
            f"{int(hallucinated.sum())} of {len(hallucinated)} words are hallucinated; both kinds are needed"
        )
    effect = probability.float()[:, None, None] - probability_without_head.float()
    return effect[hallucinated].mean(0) - effect[~hallucinated].mean(0)


def top_heads(influence: Tensor, count: int) -> list[tuple[int, int]]:
    """Return the ``count`` (layer, head) pairs with the largest influence (L, H), largest first."""
    best = torch.argsort(influence.flatten(), descending=True, stable=True)[:count].tolist()
    return [divmod(place, influence.shape[1]) for place in best]


@dataclass(frozen=True)
class ADHH:
    """In the listed heads, give the last row's keys behind the image no weight if together they have ``threshold``."""

    heads: str | Heads | None = None
    """An artefact of kind "heads", or (layer, head) pairs; required, an empty list changes nothing."""
    threshold: float = 0.4
    name = "ad_hh"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return one edit stage; none for an empty list or a threshold above 1."""
        if self.heads is None:
            raise UsageError(
                "ad_hh needs heads=, found for this model: a file of vislm calibrate-heads --what ad_hh, or pairs "
                "such as 16/29+26/9"
            )
        if not self.threshold >= 0.0:
            raise UsageError(f"threshold={self.threshold}: expected a share of attention >= 0")
        heads = head_list(self.heads, adapter, ("ad_hh",))
        if not heads or self.threshold > 1.0:
            return []
        return [EditStage(frozenset(heads), self.edit, heads=lambda layer: heads[layer])]

    def edit(self, view: EditView) -> Tensor:
        """Return the rows' weights (B, H', R, K); those of a silenced row sum to less than 1."""
        return silence_text(view.softmax(), view.keys, self.threshold)


METHOD = ADHH
