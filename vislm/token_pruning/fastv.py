"""FastV: after the second decoder layer, keep the visual tokens that the last prompt token attends to most.

Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024; github.com/pkunlp-icler/FastV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.lmm.adapters import Adapter
from vislm.lmm.attention import AttentionCall
from vislm.lmm.interventions import LanguageStage, LanguageView, Positions
from vislm.lmm.tokens import check_keep


@dataclass(frozen=True)
class FastV:
    """Drop visual tokens before decoder layer ``layer``, ranked by attention of layer ``layer - 1``.

    score_j = mean over heads of A[h, last prompt token, j], softmaxed over all keys.
    """

    keep: int | float = 0.5
    """Visual tokens per image, or a ratio of them. The keys of the first ``layer`` layers stay."""
    layer: int = 2
    positions: Positions = "original"
    name = "fastv"

    def plan(self, adapter: Adapter) -> Sequence[LanguageStage]:
        """Return one stage inside the language model."""
        rows, columns = adapter.patch_grid
        check_keep(self.keep, rows * columns if adapter.crops_per_image == 1 else None)
        return [LanguageStage(self.layer, self.layer - 1, last_row, self._select, self.positions)]

    def _select(self, view: LanguageView) -> Tensor:
        return view.top_per_image(view.signal, self.keep)


def last_row(call: AttentionCall) -> Tensor:
    """Return the head mean (B, Nk) of the last query's attention."""
    return call.rows(torch.tensor([-1], device=call.query.device)).squeeze(2).mean(1)


METHOD = FastV
