"""SparseVLM+: SparseVLM with attention freed from the rotary bias and the most visual heads; nothing is recycled.

Source: github.com/Gumpest/SparseVLMs, version 2 (December 2025), after Zhang et al., "SparseVLM: Visual Token
Sparsification for Efficient Vision-Language Model Inference", ICML 2025, arXiv 2410.04417.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.ranking import image_columns, sample_call, token_counts, top
from vislm.lmm.choosing.schedules import attention_layers, stage_counts
from vislm.lmm.choosing.text_relevance import image_raters
from vislm.lmm.choosing.tokens import check_keep, token_count
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import Alive, LanguageStage, LanguageView, Positions

LAYERS = (2, 6, 15)
"""The layers of 32 whose attention ranks."""
COUNTS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
"""Published budget -> tokens of 576 that are kept at each stage."""
_QUERIES = 32
"""Rows of attention held at once."""


def rotated_ones(cos: Tensor, sin: Tensor) -> Tensor:
    """Return (B, 1, S, d) queries (and keys) of ones after the rotary embedding cos, sin (B, S, d)."""
    half = cos.shape[-1] // 2
    sign = torch.cat([-torch.ones(half), torch.ones(half)]).to(sin)
    return (cos + sign * sin).float().unsqueeze(1)


def received(call: AttentionCall, raters: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the attention (H, Nk) that keys get from the queries ``raters`` (R,), summed over them; B = 1.

    With ``rotary`` (cos, sin), each (1, Nk, d), every weight is divided by the one that positions alone would give:
    the attention among queries and keys of ones.
    """
    total = torch.zeros(call.query.shape[1], call.key.shape[2], device=call.query.device)
    ones = None if rotary is None else rotated_ones(*rotary)
    for chosen in raters.split(_QUERIES):
        rows = call.rows(chosen)[0]
        if ones is not None:
            bare = replace(call, query=ones, key=ones, value=ones).rows(chosen)[0]
            rows = rows / bare.clamp(min=torch.finfo(bare.dtype).tiny)  # both are 0 where the mask hides a key
        total += rows.sum(1)
    return total


def relevance(received: Tensor, heads: int | float, raters: int) -> Tensor:
    """Return (V,) the mean over raters and over the ``heads`` heads that pay most attention to the image.

    Args:
        received: (H, V) attention that an image's tokens get, summed over ``raters`` queries.
        heads: how many heads, or a share of them; ties go to the lower head.
        raters: how many queries.
    """
    chosen = top(received.sum(-1), token_count(heads, len(received)))
    return received[chosen].mean(0) / raters


@dataclass(frozen=True)
class SparseVLMPlus:
    """Rank visual tokens by the corrected attention of raters, in the heads that look at the image most."""

    keep: int | float = 64
    """The published budget's name (192, 128, 96 or 64 of 576 tokens), or one between them: counts are interpolated and
    scaled to the image's tokens. It is roughly the mean over all layers."""
    counts: tuple[int, ...] | None = None
    """Tokens per image that are kept at each stage, instead of ``keep``."""
    layers: tuple[int, ...] | None = None
    """The layers whose attention ranks; tokens leave behind them. Default: 2, 6, 15 of 32, scaled to the depth."""
    heads: int | float = 14
    """Heads that are averaged (published: 14 of 32), or a share of them."""
    correct_rotary: bool = True
    """Divide attention by the attention of rotated ones."""
    positions: Positions = "original"
    calibrate: bool = False
    """Add RESTORE's logit calibration (``vislm.lmm.decoder.calibration``)."""
    name = "sparsevlm_plus"

    def plan(self, adapter: Adapter) -> Sequence[LanguageStage]:
        """Return one stage behind each ranking layer."""
        if self.counts is None:
            check_keep(self.keep)
        check_keep(self.heads)
        layers = attention_layers(self.name, LAYERS, self.layers, self.counts, len(adapter.layers))
        return [
            LanguageStage(
                layer + 1,
                layer,
                lambda call: call,
                partial(self._select, stage),
                self.positions,
                expected=partial(self._expected, stage),
            )
            for layer, stage in layers.items()
        ]

    def _count(self, stage: int, total: int) -> int:
        return (self.counts or stage_counts(COUNTS, self.keep, total))[stage]

    def _expected(self, stage: int, alive: Alive) -> int:
        return self._count(stage, alive.first)

    def _select(self, stage: int, view: LanguageView) -> Tensor:
        tokens = view.memory.setdefault("tokens", token_counts(view.image_of))
        cos, sin = (part.expand(len(view.image_of), -1, -1) for part in view.rotary)
        keep = torch.ones_like(view.image_of, dtype=torch.bool)
        for place, columns in image_columns(view.image_of):
            count = self._count(stage, tokens[place])
            raters = image_raters(view, place, columns)
            if count >= len(columns) or not len(raters):
                continue
            row = place[0]
            own = (cos[row : row + 1], sin[row : row + 1]) if self.correct_rotary else None
            paid = received(sample_call(view.signal, row), raters, own)[:, columns]
            keep[row, columns] = False
            keep[row, columns[top(relevance(paid, self.heads, len(raters)), count)]] = True
        return keep


METHOD = SparseVLMPlus
