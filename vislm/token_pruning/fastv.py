"""FastV: after the second decoder layer, keep the visual tokens that the last prompt token attends to most.

Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764;
github.com/pkunlp-icler/FastV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.random_choice import random_tokens
from vislm.lmm.choosing.ranking import last_row, token_counts, top_counts
from vislm.lmm.choosing.schedules import keep_for_average
from vislm.lmm.choosing.tokens import check_keep, token_count
from vislm.lmm.interventions import ImageView, LanguageStage, LanguageView, Positions, PromptStage


@dataclass(frozen=True)
class FastV:
    """Drop visual tokens before decoder layer ``layer``, ranked by attention of layer ``layer - 1``.

    score_j = mean over heads of A[h, last prompt token, j], softmaxed over all keys. The official code also has a mode
    that hides the dropped tokens' keys and goes on computing the tokens; what is kept comes out the same there.
    """

    keep: int | float = 0.5
    """Visual tokens per image, or a ratio of them. The keys of the first ``layer`` layers stay."""
    layer: int = field(default=2, metadata={"range": lambda budget, layers: (1, max(1, layers // 2))})
    """0: a random choice before the language model, the paper's baseline."""
    average: bool = False
    """``keep`` is the mean over all decoder layers, of which the first ``layer`` process everything; e.g. 128 of 576
    with 32 layers leaves 98. Off: what stays behind the cut. Published tables use either."""
    positions: Positions = "original"
    calibrate: bool = False
    """Add RESTORE's logit calibration (``vislm.lmm.decoder.calibration``)."""
    seed: int = 0
    """Of the random choice with ``layer=0``."""
    name = "fastv"

    def plan(self, adapter: Adapter) -> Sequence[PromptStage | LanguageStage]:
        """Return one stage inside the language model, or before it with ``layer=0``."""
        depth, tokens = len(adapter.layers), adapter.tokens_per_image
        check_keep(self.keep)
        if tokens is not None and 0 <= self.layer < depth:
            self._count(tokens, depth)  # refuses at once an average that cannot be had
        if self.layer == 0:
            return [PromptStage(self._random, self.positions, expected=lambda alive: alive.after(self.keep))]
        select = partial(self._select, depth)
        stage = LanguageStage(self.layer, self.layer - 1, last_row, select, self.positions)
        return [replace(stage, expected=lambda alive: self._count(alive.tokens, depth))]

    def _count(self, tokens: int, depth: int) -> int:
        """Return how many of an image's tokens stay behind the cut."""
        if self.average:
            mean = self.keep * tokens if isinstance(self.keep, float) else min(self.keep, tokens)
            return keep_for_average(mean, tokens, self.layer, depth)
        return token_count(self.keep, tokens)

    def _random(self, view: ImageView) -> Tensor:
        return random_tokens(view, self.keep, self.seed)

    def _select(self, depth: int, view: LanguageView) -> Tensor:
        counts = {place: self._count(total, depth) for place, total in token_counts(view.image_of).items()}
        return top_counts(view.signal, view.image_of, counts)


METHOD = FastV
