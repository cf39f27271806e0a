"""Random pruning: the baseline that every pruning table must contain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.random_choice import random_tokens
from vislm.lmm.choosing.tokens import check_keep
from vislm.lmm.interventions import ImageView, Positions, PromptStage


@dataclass(frozen=True)
class RandomPruning:
    """Keep a uniformly random subset of every image's patch tokens.

    The subset depends on the image's features and the seed alone, so that it is the same in any batch.
    """

    keep: int | float = 64
    """Visual tokens per image, or a ratio of them."""
    seed: int = 0
    positions: Positions = "original"
    calibrate: bool = False
    """Add RESTORE's logit calibration (``vislm.lmm.decoder.calibration``)."""
    name = "random"

    def plan(self, adapter: Adapter) -> Sequence[PromptStage]:
        """Return one stage before the language model."""
        check_keep(self.keep)
        return [PromptStage(self._select, self.positions, expected=lambda alive: alive.after(self.keep))]

    def _select(self, view: ImageView) -> Tensor:
        return random_tokens(view, self.keep, self.seed)


METHOD = RandomPruning
