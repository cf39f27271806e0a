"""Random pruning: the baseline that every pruning table must contain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.lmm.adapters import Adapter
from vislm.lmm.interventions import ImageView, Positions, PromptStage
from vislm.lmm.tokens import check_keep, token_count


@dataclass(frozen=True)
class RandomPruning:
    """Keep a uniformly random subset of every image's patch tokens.

    The subset depends on the image's features and the seed alone, so that it is the same in any batch.
    """

    keep: int | float = 64
    """Visual tokens per image, or a ratio of them."""
    seed: int = 0
    positions: Positions = "original"
    name = "random"

    def plan(self, adapter: Adapter) -> Sequence[PromptStage]:
        """Return one stage before the language model."""
        check_keep(self.keep)
        return [PromptStage(self._select, self.positions, expected=lambda alive: alive.after(self.keep))]

    def _select(self, view: ImageView) -> Tensor:
        candidates = view.candidates.nonzero().flatten()
        count = token_count(self.keep, len(candidates))
        generator = torch.Generator().manual_seed(self.seed + _content(view.features[candidates]))
        chosen = torch.randperm(len(candidates), generator=generator)[:count]
        keep = torch.zeros_like(view.candidates)
        keep[candidates[chosen.to(candidates.device)]] = True
        return keep


def _content(features: Tensor) -> int:
    """Return a number that tells one image from another: the signs of 24 mean features."""
    signs = (features[:, :24].float().mean(0) > 0).long()
    return int((signs << torch.arange(len(signs), device=signs.device)).sum())


METHOD = RandomPruning
