"""ILVAD: find the visual evidence where attention jumps between layers, and keep looking at it and at text that does.

Source: Xie et al., "Finding the Correct Visual Evidence Without Forgetting: Mitigating Hallucination in LVLMs via
Inter-Layer Visual Attention Discrepancy", ICML 2026, arXiv 2605.20965; github.com/ytx-ML/ILVAD. A draft of the answer
is written first, by ``generate`` itself; a bare forward of the model is refused. Open in our source, and chosen here:
the half of the heads is taken at each step, the standard deviation has the divisor n - 1, and a text token's score is
its own row's evidence-weighted attention, mean over the heads that look at the evidence most, in the same layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.layer_ranges import chosen_layers
from vislm.lmm.decoder.edits import pieces, row_logits
from vislm.lmm.decoder.image_slots import ImageSlots
from vislm.lmm.decoder.key_groups import KeyGroups
from vislm.lmm.interventions import EditStage, EditView, PrepareView


def top_half(score: Tensor) -> Tensor:
    """Return (B, H, R) bool: the H/2 heads with the highest score (B, H, R); ties go to the lower head."""
    best = score.argsort(dim=1, descending=True, stable=True)[:, : max(1, score.shape[1] // 2)]
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True)


def minmax(values: Tensor, valid: Tensor) -> Tensor:
    """Return values (..., N) brought to [0, 1] over the valid entries (..., N) bool; 0 where they are all equal."""
    low = values.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    span = values.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True) - low
    return torch.where(valid & (span > 0), (values - low) / span, 0.0)


def log_saliency(maps: Tensor, valid: Tensor, alpha: float, activation: float = 5.0) -> Tensor:
    """Return ln E (B, V) in [0, alpha]: how often each image token becomes active from one layer to the next.

    Args:
        maps: (B, L, V) attention on the image tokens, by layer.
        valid: (B, V) bool: tokens that exist.
        alpha: largest value.
        activation: a token is active in a layer where it has more than so many times the mean.
    """
    maps = torch.where(valid[:, None], maps, 0.0)
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    active = maps > activation * maps.sum(-1, keepdim=True) / count[:, None]
    jumps = (active[:, 1:] & ~active[:, :-1]).sum(1).float()
    overall = maps.mean(1)
    jumps = torch.where(overall > overall.sum(-1, keepdim=True) / count, jumps, 0.0)
    mean = jumps.sum(-1, keepdim=True) / count
    spread = torch.where(valid, jumps - mean, 0.0).square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    limit = 3.0 * spread.sqrt()
    return alpha * minmax(jumps.clamp(mean - limit, mean + limit), valid)


def evidence_mass(weights: Tensor, evidence: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum(a ln E) and the heads' rank sum(a ln E) / sum(a), each (B, H, R), over the image keys.

    Args:
        weights: (B, H, R, K).
        evidence: (B, K) ln E, 0 elsewhere.
        image: (B, K) bool.
    """
    mass = (weights * evidence[:, None, None]).sum(-1)
    seen = torch.where(image[:, None, None], weights, 0.0).sum(-1)
    return mass, mass / seen.clamp(min=torch.finfo(seen.dtype).tiny)


def token_score(weights: Tensor, evidence: Tensor, image: Tensor) -> Tensor:
    """Return (B, R): how much each row looks at the evidence, mean of sum(a ln E) over the top half of the heads."""
    mass, rank = evidence_mass(weights, evidence, image)
    chosen = top_half(rank)
    return torch.where(chosen, mass, 0.0).sum(1) / chosen.sum(1)


def enhance(
    weights: Tensor, evidence: Tensor, image: Tensor, text: Tensor, scores: Tensor, beta: float, allowed: Tensor
) -> Tensor:
    """Return a row's weights (B, H, 1, K), renormalised: image keys times E, later keys times score + beta.

    Each in its own half of the heads: those that look at the evidence most, and those with most mass on later keys.

    Args:
        weights: (B, H, 1, K), rows sum to 1.
        evidence: (B, K) ln E, 0 elsewhere.
        image: (B, K) bool.
        text: (B, K) bool: keys behind the image.
        scores: (B, K) of the keys behind the image, brought to [0, 1] here.
        beta: weight of a text key that never looked at the evidence.
        allowed: (B or 1, 1, 1, K) bool: keys that the row may attend to.
    """
    looks = top_half(evidence_mass(weights, evidence, image)[1]).unsqueeze(-1)
    reads = top_half(torch.where(text[:, None, None], weights, 0.0).sum(-1)).unsqueeze(-1)
    gain = torch.where(text, minmax(scores, text & allowed[:, 0, 0]) + beta, 1.0)[:, None, None]
    weights = torch.where(looks, weights * evidence.exp()[:, None, None], weights)
    weights = torch.where(reads, weights * gain, weights)
    return weights / weights.sum(-1, keepdim=True)


@dataclass(frozen=True)
class ILVAD:
    """Write a draft, find the evidence in it, and answer anew with the last row's attention turned towards it."""

    alpha: float = 5.0
    """Largest ln E."""
    beta: float = 1.0
    """Least factor of a text key; POPE 1, CHAIR 0.3 (with layers 5-25)."""
    layers: tuple[int, ...] | None = None
    """Decoder layers that are edited, 0-based; None: 0-30 of every 32."""
    draft_tokens: int = 10
    activation: float = 5.0
    """A token is active in a layer where its attention is more than so many times the mean."""
    name = "ilvad"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return a stage that watches the draft and one that edits; none when alpha is 0 and beta 1."""
        for option in ("alpha", "beta", "activation"):
            if not 0.0 <= getattr(self, option) < math.inf:
                raise UsageError(f"{option}={getattr(self, option)}: expected a finite number >= 0")
        if isinstance(self.draft_tokens, bool) or self.draft_tokens < 2:
            raise UsageError(
                f"draft_tokens={self.draft_tokens!r}: expected a whole number >= 2 (the first is not used)"
            )
        depth = len(adapter.layers)
        layers = chosen_layers(self.layers, depth, 0, 31)
        if not layers or (self.alpha == 0.0 and self.beta == 1.0):
            return []
        watch = EditStage(frozenset(range(depth)), self.watch, draft=self.draft_tokens, observes=True)
        return [watch, EditStage(layers, self.edit, prepare=self.prepare, by_row=("scores",))]

    def watch(self, view: EditView) -> None:
        """Keep the last row's attention on the image, mean over the half of the heads with most of it."""
        if view.phase == "prefill":
            if "slots" not in view.memory:
                view.memory.update(slots=ImageSlots.of(view.keys), maps={})
            view.memory["maps"][view.layer] = []
            return
        slots, image = view.memory["slots"], view.keys.image[:, None, None]
        weights = torch.where(image, view.softmax(), 0.0)[:, :, 0]
        chosen = top_half(weights.sum(-1, keepdim=True))
        mean = torch.where(chosen, weights, 0.0).sum(1) / chosen.sum(1)
        view.memory["maps"][view.layer].append(slots.put(mean, view.keys))

    def prepare(self, view: PrepareView) -> None:
        """Score the prompt's text behind the image by its own rows."""
        queries, keys = view.call.query.shape[2], view.keys
        evidence = self._evidence(keys, view.memory)
        scores = torch.zeros(keys.valid.shape[0], queries, device=keys.valid.device)
        for rows in pieces(view.call, keys.after[:, :queries].any(0).nonzero().flatten()):
            logits = row_logits(view.call, rows).masked_fill(~view.call.allowed(rows), -torch.inf)
            scores[:, rows] = token_score(logits.softmax(-1), evidence, keys.image)
        view.memory.setdefault("scores", {})[view.layer] = scores

    def edit(self, view: EditView) -> Tensor:
        """Return the last row's weights (B, H, 1, K)."""
        keys, memory, weights = view.keys, view.memory, view.softmax()
        evidence = self._evidence(keys, memory)
        scores = memory["scores"][view.layer]
        if view.phase == "decode":
            scores = torch.cat([scores, token_score(weights, evidence, keys.image)], 1)
            memory["scores"][view.layer] = scores
        scores = torch.nn.functional.pad(scores, (0, weights.shape[-1] - scores.shape[1]))
        edited = enhance(weights, evidence, keys.image, keys.after, scores, self.beta, view.allowed)
        return torch.where(memory["found"][:, None, None, None], edited, weights)

    def _evidence(self, keys: KeyGroups, memory: dict[str, Any]) -> Tensor:
        """Return ln E (B, K) of a layer's keys, the same tensor for layers that hold the same."""
        if "answer_slots" not in memory:
            self._conclude(memory, len(keys.valid))
            memory["answer_slots"] = memory["slots"].renumbered(keys)
        if memory.get("keys") is not keys:
            memory.update(keys=keys, evidence=memory["answer_slots"].take(memory["log_saliency"], keys))
        return memory["evidence"]

    def _conclude(self, memory: dict[str, Any], batch: int) -> None:
        """Turn what the draft left into ln E by image token, for each of the ``batch`` rows of the answer."""
        steps = [torch.stack(memory["maps"][layer], 1) for layer in sorted(memory["maps"]) if memory["maps"][layer]]
        slots: ImageSlots = memory["slots"]
        lengths = memory["draft_tokens"]
        saliency = torch.zeros(slots.valid.shape, device=slots.valid.device)
        if steps:
            seen = torch.stack(steps, 1)  # (B, L, steps, V); the first row of them wrote the second token
            counts = torch.arange(2, seen.shape[2] + 2, device=lengths.device) <= lengths[:, None]
            maps = torch.where(counts[:, None, :, None], seen, 0.0).sum(2) / counts.sum(-1).clamp(min=1)[:, None, None]
            saliency = log_saliency(maps, slots.valid, self.alpha, self.activation)
        copies = batch // len(lengths)
        memory["log_saliency"] = saliency.repeat_interleave(copies, 0)
        memory["found"] = (lengths >= 2).repeat_interleave(copies)


METHOD = ILVAD
