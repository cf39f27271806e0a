"""VisPruner: keep the patches that attract attention, and of the others those that are least alike.

Source: Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
ICCV 2025, arXiv 2412.01818; github.com/Theia-4869/VisPruner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.crops import check_budget, crop_budgets, crop_tokens, packed, packed_features, patch_attention
from vislm.lmm.choosing.ranking import top
from vislm.lmm.interventions import Alive, ImageView, Positions, PromptStage, TowerSignal

STEP = 8
"""Tokens that one round deletes at most."""


def diverse(features: Tensor, order: Tensor, count: int) -> Tensor:
    """Return the ``count`` tokens of ``order`` (R,) that are left when near-duplicates are deleted, shape (count,).

    Each round splits the list into its even and odd places, finds for every even token the most similar odd one, and
    deletes the up to 8 even tokens with the closest match. The even survivors, most similar first, and then the odd
    ones in their order are the next list. (The official code needs lists of even length; here an odd one has one even
    place more.)

    Args:
        features: (N, C) vision features; similarity is their cosine, in float32.
        order: indices into them, most attended first.
        count: tokens to leave, at most R.
    """
    if count == 0:
        return order[:0]
    unit = normalize(features[order].float(), dim=-1)
    similarity = unit @ unit.T
    left = torch.arange(len(order), device=order.device)
    while len(left) > count:
        even, odd = left[::2], left[1::2]
        match = similarity[even].index_select(1, odd).amax(-1)
        closest_first = even[top(match, len(even))]
        left = torch.cat([closest_first[min(STEP, len(left) - count) :], odd])
    return order[left]


def choose(attention: Tensor, features: Tensor, keep: int, important_ratio: float) -> Tensor:
    """Return keep (N,) bool with ``keep`` tokens: the most attended int(keep · ratio), and diverse ones of the rest.

    Args:
        attention: (N,) attention received, ranked in float32.
        features: (N, C) vision features.
        keep: T, at most N.
        important_ratio: rho, the share of T that attention decides.
    """
    order, important = top(attention, len(attention)), int(keep * important_ratio)
    kept = torch.zeros(len(attention), dtype=torch.bool, device=attention.device)
    kept[order[:important]] = True
    kept[diverse(features, order[important:], keep - important)] = True
    return kept


@dataclass(frozen=True)
class VisPruner:
    """Drop tokens before the language model by the attention of the read layer and the similarity of its features.

    Towers without CLS rank by the mean attention that a token receives from all tokens; where patches are joined before
    the projector, cells are compared by their projected features. Crops of tiled images are pruned one by one, after
    padding is removed; newline tokens go.
    """

    keep: int | float = 64
    """Visual tokens per image, or a ratio of them; crops get equal shares."""
    important_ratio: float = 0.5
    """Share of the budget that attention decides; diversity decides the rest."""
    crop_keep: int | None = None
    """Tokens of each crop whatever their number, in place of ``keep``."""
    positions: Positions = "contiguous"
    calibrate: bool = False
    """Add RESTORE's logit calibration (``vislm.lmm.decoder.calibration``)."""
    name = "vispruner"

    def plan(self, adapter: Adapter) -> Sequence[PromptStage]:
        """Return one stage before the language model, which looks at the attention of the read layer."""
        check_budget(self.keep, self.crop_keep)
        if not 0.0 <= self.important_ratio <= 1.0:
            raise UsageError(f"important_ratio={self.important_ratio}: expected a share of the budget from 0 to 1")
        prefix = adapter.tower_prefix
        attention = TowerSignal(adapter.read_layer, partial(patch_attention, prefix=prefix))
        signals = {"attention": attention}
        return [PromptStage(partial(self._select, prefix), self.positions, signals, expected=self._expected)]

    def _expected(self, alive: Alive) -> int:
        return alive.after(sum(crop_budgets(alive.crops, self.keep, self.crop_keep)))

    def _select(self, prefix: int, view: ImageView) -> Tensor:
        crops = crop_tokens(view, "attention")
        budgets = crop_budgets([len(tokens) for tokens in crops], self.keep, self.crop_keep)
        if all(budget == len(tokens) for budget, tokens in zip(budgets, crops, strict=True)):
            return torch.ones_like(view.candidates)
        attention, features = packed(view, "attention")[:, 0], packed_features(view, prefix)
        keep = torch.zeros_like(view.candidates)
        for tokens, budget in zip(crops, budgets, strict=True):
            keep[tokens] = choose(attention[tokens], features[tokens], budget, self.important_ratio)
        return keep


METHOD = VisPruner
