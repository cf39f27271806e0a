"""SparseVLM: behind three decoder layers, keep the visual tokens that the relevant words attend to; recycle the rest.

Source: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025,
arXiv 2410.04417; github.com/Gumpest/SparseVLMs (version 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vislm import kernels
from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.clustering import cluster_means, density_peaks
from vislm.lmm.choosing.ranking import image_columns, sample_call, token_counts, top
from vislm.lmm.choosing.schedules import attention_layers, stage_counts
from vislm.lmm.choosing.text_relevance import image_raters
from vislm.lmm.choosing.tokens import check_keep
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import Alive, LanguageSelection, LanguageStage, LanguageView, Positions

LAYERS = (2, 6, 15)
"""The layers of 32 whose attention ranks."""
COUNTS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Published budget -> tokens of 576 that are kept at each stage; recycled tokens come on top."""


def relevance(call: AttentionCall, raters: Tensor) -> Tensor:
    """Return the attention (Nk,) that keys get, mean over heads and over the queries ``raters`` (R,); B = 1."""
    received = call.statistics(kernels.StatisticsRequest(received=raters)).received
    assert received is not None
    return received[0].mean(0) / len(raters)


def recycle_candidates(scores: Tensor, keep: Tensor, share: float) -> Tensor:
    """Return the int(share D) + 1 most relevant of D dropped tokens, best first; none if ``share`` is 0.

    Args:
        scores: (V,) relevance.
        keep: (V,) bool.
        share: part of the dropped tokens that is recycled.
    """
    dropped = (~keep).nonzero().squeeze(1)
    return dropped[top(scores[dropped], candidate_count(len(dropped), share))]


def candidate_count(dropped: int, share: float) -> int:
    """Return how many of ``dropped`` tokens are recycled: int(share D) + 1, none if ``share`` is 0."""
    return min(dropped, int(share * dropped) + 1) if share else 0


def cluster_count(candidates: int, per_cluster: int) -> int:
    """Return how many tokens are made of ``candidates``: int(M / per_cluster) + 1, and no more than there are."""
    return min(candidates, candidates // per_cluster + 1)


class Recycled(NamedTuple):
    """K tokens made of M dropped ones."""

    tokens: Tensor
    """(K, C) means of the clusters, float32."""
    center: Tensor
    """(K,) the candidate in the middle of each."""
    label: Tensor
    """(M,) where each candidate went."""


def recycle(tokens: Tensor, per_cluster: int = 10, noise_seed: int | None = None) -> Recycled:
    """Merge candidates (M, C) into int(M / per_cluster) + 1 tokens, the means of density-peak clusters."""
    count = cluster_count(len(tokens), per_cluster)
    clusters = density_peaks(tokens, count, noise_seed)
    return Recycled(cluster_means(tokens, clusters.label, count), clusters.center, clusters.label)


@dataclass(frozen=True)
class SparseVLM:
    """Rank visual tokens by the attention of raters, the words behind an image that resemble it most.

    relevance_j = mean over raters i and heads of A[h, i, j]. Of the dropped tokens the most relevant are clustered, and
    the clusters' means follow the image's kept tokens.
    """

    keep: int | float = 64
    """The published budget's name (192, 128, 96 or 64 of 576 tokens), or one between them: counts are interpolated and
    scaled to the image's tokens. It is roughly the mean over all layers, recycled tokens not counted."""
    counts: tuple[int, ...] | None = None
    """Tokens per image that are kept at each stage, instead of ``keep``."""
    layers: tuple[int, ...] | None = None
    """The layers whose attention ranks; tokens leave behind them. Default: 2, 6, 15 of 32, scaled to the depth."""
    recycle: float = 0.3
    """Part of the dropped tokens that is recycled; 0: none."""
    per_cluster: int = 10
    """Recycled tokens per cluster, about."""
    positions: Positions = "contiguous"
    """With original positions a recycled token sits where its cluster's center was, not behind the kept ones."""
    calibrate: bool = False
    """Add RESTORE's logit calibration which lets recycled tokens weigh like those they stand for
    (``vislm.lmm.decoder.calibration``)."""
    noise_seed: int | None = None
    """Add the official code's noise, 1e-6 U(0, 1), to the densities; there it is drawn anew in every run, which makes
    clusterings into two random. None: ties go to the lower index."""
    drop_one: bool = False
    """Official: at most V - 1 of V tokens stay at each stage, whatever the budget. Off: keeping V changes nothing."""
    name = "sparsevlm"

    def plan(self, adapter: Adapter) -> Sequence[LanguageStage]:
        """Return one stage behind each ranking layer."""
        if self.counts is None:
            check_keep(self.keep)
        if not 0.0 <= self.recycle <= 1.0 or self.per_cluster < 1:
            raise UsageError(
                f"recycle={self.recycle}, per_cluster={self.per_cluster}: expected a share in [0, 1] and at least 1"
            )
        layers = attention_layers(self.name, LAYERS, self.layers, self.counts, len(adapter.layers))
        return [
            LanguageStage(
                layer + 1,
                layer,
                lambda call: call,
                partial(self.select, stage),
                self.positions,
                expected=partial(self._expected, stage),
            )
            for layer, stage in layers.items()
        ]

    def _count(self, stage: int, total: int, alive: int) -> int:
        """Return how many of an image's ``alive`` tokens a stage keeps; there were ``total`` before the first."""
        count = (self.counts or stage_counts(COUNTS, self.keep, total))[stage]
        return max(1, min(count, alive - self.drop_one))

    def _expected(self, stage: int, alive: Alive) -> int:
        count = self._count(stage, alive.first, alive.tokens)
        if count >= alive.tokens:
            return alive.tokens
        return count + cluster_count(candidate_count(alive.tokens - count, self.recycle), self.per_cluster)

    def select(self, stage: int, view: LanguageView) -> Tensor | LanguageSelection:
        """Return what stays behind stage number ``stage`` and, with recycling, what the seats hold."""
        tokens = view.memory.setdefault("tokens", token_counts(view.image_of))
        size, hidden = view.size.clone(), None
        keep = torch.ones_like(view.image_of, dtype=torch.bool)
        for place, columns in image_columns(view.image_of):
            row, raters = place[0], image_raters(view, place, columns)
            count = self._count(stage, tokens[place], len(columns))
            if count >= len(columns) or not len(raters):
                continue
            scores = relevance(sample_call(view.signal, row), raters)[columns]
            seats, contents, stand_for = self._contents(scores, count, view.hidden[row, columns], size[row, columns])
            hidden = view.hidden.clone() if hidden is None else hidden
            keep[row, columns] = False
            seats = columns[seats]
            keep[row, seats], hidden[row, seats], size[row, seats] = True, contents, stand_for
        if hidden is None or not self.recycle:
            return keep
        return LanguageSelection(keep, hidden, size)

    def _contents(self, scores: Tensor, count: int, tokens: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the seats (m,) of one image's V tokens that stay occupied, ascending, and their contents and sizes."""
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep[top(scores, count)] = True
        candidates = recycle_candidates(scores, keep, self.recycle)
        seats = keep.nonzero().squeeze(1)
        if not len(candidates):
            return seats, tokens[seats], size[seats]
        new = recycle(tokens[candidates], self.per_cluster, self.noise_seed)
        contents = torch.cat([tokens[seats], new.tokens.to(tokens)])
        sums = torch.zeros(len(new.tokens), device=size.device).index_add_(0, new.label, size[candidates])
        sizes = torch.cat([size[seats], sums])
        if self.positions == "original":
            seats, order = torch.cat([seats, candidates[new.center]]).sort()
            return seats, contents[order], sizes[order]
        free = (~keep).nonzero().squeeze(1)[-len(new.tokens) :]
        return torch.cat([seats, free]).sort().values, contents, sizes


METHOD = SparseVLM
