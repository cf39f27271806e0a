"""DivPrune: keep the visual tokens that lie farthest apart from each other.

Source: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025, arXiv
2503.02175; github.com/vbdi/divprune.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.tokens import check_keep, token_count
from vislm.lmm.interventions import Alive, ImageView, Positions, PromptStage, Selection

ROWS = 512
"""Rows of the distance matrix that are held at once while the first token is looked for."""
WHOLE = 8192
"""Up to so many tokens the whole matrix is held while the others are."""


def cosine_distance(tokens: Tensor, others: Tensor) -> Tensor:
    """Return 1 - cosine similarity (n, m) of tokens (n, C) and others (m, C), in float32."""
    return 1.0 - functional.normalize(tokens.float(), dim=-1) @ functional.normalize(others.float(), dim=-1).T


def max_min_diversity(tokens: Tensor, count: int) -> Tensor:
    """Return the indices (count,) of a greedy max-min selection from tokens (n, C), in the order of selection.

    The first is the token whose nearest neighbour is farthest; then always the one farthest from all selected.
    """
    unit = functional.normalize(tokens.float(), dim=-1)
    similarity = None
    if len(unit) <= WHOLE:  # one product; row by row, every step would read all tokens again
        similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
        isolation = 1.0 - similarity.amax(-1)
    else:
        isolation = torch.cat([_nearest(unit, start) for start in range(0, len(unit), ROWS)])
    selected = torch.empty(min(count, len(unit)), dtype=torch.int64, device=tokens.device)
    distance = torch.full_like(isolation, torch.inf)
    farthest = isolation.argmax()
    for step in range(len(selected)):  # nothing here waits for the device
        selected[step] = farthest
        chosen = farthest.view(1)
        near = unit @ unit.index_select(0, chosen)[0] if similarity is None else similarity.index_select(0, chosen)[0]
        distance = torch.minimum(distance, 1.0 - near).index_fill_(0, chosen, -torch.inf)
        farthest = distance.argmax()
    return selected


def _nearest(unit: Tensor, start: int) -> Tensor:
    """Return the distance to the nearest other token of up to ``ROWS`` tokens from ``start`` on."""
    distance = 1.0 - unit[start : start + ROWS] @ unit.T
    own = torch.arange(len(distance), device=unit.device)
    distance[own, own + start] = torch.inf
    return distance.min(-1).values


@dataclass(frozen=True)
class DivPrune:
    """Select a maximally diverse subset of every image's visual tokens before the language model.

    Looks at the projected features alone: no attention, no question. Costs O(n^2 C) for n tokens.
    """

    keep: int | float = 0.098
    """Visual tokens per image, or a ratio of them."""
    newlines: bool = True
    """Whether separator tokens of tiled images are candidates like the others, as in the official code; else they
    are dropped."""
    positions: Positions = "contiguous"
    """The official code cuts the embeddings, so that the survivors are numbered anew."""
    calibrate: bool = False
    """Add RESTORE's logit calibration (``vislm.lmm.decoder.calibration``)."""
    name = "divprune"

    def plan(self, adapter: Adapter) -> Sequence[PromptStage]:
        """Return one stage before the language model."""
        check_keep(self.keep)
        return [PromptStage(self._select, self.positions, expected=self._expected)]

    def _expected(self, alive: Alive) -> int:
        return token_count(self.keep, alive.tokens if self.newlines else alive.candidates)

    def _select(self, view: ImageView) -> Selection:
        alive = ~view.features.isnan().all(-1)
        separators_stand = self.newlines and bool(alive.all())
        candidates = (alive if separators_stand else view.candidates).nonzero().flatten()
        count = token_count(self.keep, len(candidates))
        if count == len(candidates):
            return Selection(alive if separators_stand else view.candidates)
        keep = torch.zeros_like(alive)
        keep[candidates[max_min_diversity(view.features[candidates], count)]] = True
        return Selection(keep)


METHOD = DivPrune
