"""DoLa: contrast the last layer's next-token distribution with that of an early layer, chosen at every step.

Source: Chuang et al., "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models", ICLR 2024,
arXiv 2309.03883; github.com/voidful/DoLa. Little effect is reported on image-text models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.interventions import LogitsStage, LogitsView

Bucket = Literal["low", "high"]


def candidate_layers(depth: int, bucket: Bucket, tied: bool = False) -> tuple[int, ...]:
    """Return every second layer of the lower or the upper half of ``depth`` decoder layers.

    Layer n is what enters decoder layer n, 0 the embedding. With tied embeddings the lower half starts at 2: the
    embedding itself would predict the word that was just read.
    """
    if bucket == "high":
        return tuple(range(depth // 2, depth, 2))
    return tuple(range(2 if tied else 0, depth // 2, 2)) or (depth // 2,)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence (...) of log-probabilities (..., V), in nats."""
    middle = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (_relative_entropy(log_p, middle) + _relative_entropy(log_q, middle))


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p.isneginf(), 0.0, terms).sum(-1)


def choose(log_final: Tensor, log_early: Tensor) -> Tensor:
    """Return (B,) int64: for each sample the early distribution (n, B, V) that diverges most from the final (B, V)."""
    return divergence(log_final, log_early).argmax(0)


def contrast(log_final: Tensor, log_early: Tensor, relative_top: float) -> Tensor:
    """Return log p_final - log p_early (..., V), -inf where p_final is below ``relative_top`` times its maximum."""
    scores = log_final - log_early
    if relative_top == 0.0:
        return scores
    least = log_final.max(-1, keepdim=True).values + math.log(relative_top)
    return scores.masked_fill(log_final < least, -torch.inf)


@dataclass(frozen=True)
class DoLa:
    """Contrast with the early layer that diverges most, for all samples, with an image or without."""

    bucket: Bucket = "low"
    """Candidates: "low" half (long answers) or "high" half (short ones) of the layers."""
    layers: tuple[int, ...] | None = None
    """The candidates themselves; 0 is the embedding. None: those of ``bucket``; none at all changes nothing."""
    relative_top: float = 0.1
    name = "dola"

    def plan(self, adapter: Adapter) -> Sequence[LogitsStage]:
        """Return one logits stage; none without candidates."""
        if not 0.0 <= self.relative_top <= 1.0:
            raise UsageError(f"relative_top={self.relative_top}: expected a number in [0, 1] (0 keeps all tokens)")
        if self.bucket not in ("low", "high"):
            raise UsageError(f"bucket={self.bucket!r}: expected 'low' or 'high'")
        tied = bool(getattr(adapter.config, "tie_word_embeddings", False))
        layers = candidate_layers(len(adapter.layers), self.bucket, tied) if self.layers is None else self.layers
        return [LogitsStage(self._adjust, early_layers=tuple(layers), every_sample=True)] if layers else []

    def _adjust(self, view: LogitsView) -> Tensor:
        log_final = view.logits.log_softmax(-1)
        numbers = sorted(view.early)
        log_early = torch.stack([view.early[n] for n in numbers]).log_softmax(-1)
        chosen = choose(log_final, log_early)
        view.memory.setdefault("layers", []).append([numbers[n] for n in chosen.tolist()])
        samples = torch.arange(len(chosen), device=chosen.device)
        return contrast(log_final, log_early[chosen, samples], self.relative_top)


METHOD = DoLa
