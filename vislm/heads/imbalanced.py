"""Imbalanced attention (PAINT): raise the last row's logits on two groups of image tokens that the tower points at.

Source: Arif et al., "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
arXiv 2501.12206; github.com/hasanar1f/llava-hallunication-fix. The paper's measure of a head's visual sensitivity is in
no released code; ``head_gain`` takes its place. The code's spatial tokens are left out: its call selects none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.errors import PlanConflict, UsageError
from vislm.kernels import StatisticsRequest
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.layer_ranges import chosen_layers
from vislm.lmm.choosing.ranking import top
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.decoder.known_keys import follow
from vislm.lmm.interventions import EditStage, EditView, ImageView, ProbeStage, TowerSignal


def cls_attention(call: AttentionCall, prefix: int) -> Tensor:
    """Return the attention of the CLS row on the N patches of every crop, summed over heads, (K, N, 1) float32.

    A tower without CLS has no such row; the attention that patches receive on average stands in for it.
    """
    if prefix:
        attention = call.rows(torch.tensor([0])).squeeze(2)
    else:
        received = call.statistics(StatisticsRequest(received=True)).received
        assert received is not None
        attention = received / call.query.shape[2]
    return attention.sum(1)[:, prefix:].unsqueeze(-1)


def outlier_ratio(attention: Tensor) -> float:
    """Return the share of entries (N,) above Q3 + 1.5 (Q3 - Q1), with linearly interpolated quartiles."""
    values = attention.double()
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=torch.float64, device=values.device))
    return int((values > high + 1.5 * (high - low)).sum()) / len(values)


def select_tokens(first: Tensor, penultimate: Tensor, local_token_ratio: float) -> tuple[Tensor, Tensor]:
    """Return the local tokens, ascending, and the summary tokens, most attended first; indices into N tokens.

    Args:
        first: (N,) CLS attention in the tower's first layer: its top share is local, summary tokens left out.
        penultimate: (N,) in the last layer but one: as many tokens as there are outliers are summary tokens.
        local_token_ratio: share of the N tokens.
    """
    count = len(first)
    summary = top(penultimate, math.floor(outlier_ratio(penultimate) * count))
    local = top(first, math.floor(local_token_ratio * count)).sort().values
    return local[~torch.isin(local, summary)], summary


def boost(logits: Tensor, strength: Tensor) -> Tensor:
    """Return logits S + c |S| for logits (B, H, R, K) and strengths c (B, H, 1, K), 0 where nothing changes."""
    return logits + strength * logits.abs()


def whole_layer(adapter: Adapter, layers: Sequence[int]) -> int:
    """Return the first of some tower layers that sees whole crops; in some towers most layers see windows of them.

    Raises:
        PlanConflict: there is none.
    """
    conflict: PlanConflict | None = None
    for layer in layers:
        try:
            adapter.check_tower_signal(layer)
            return layer
        except PlanConflict as error:
            conflict = error
    raise conflict or PlanConflict("the vision tower has no layers")


@dataclass(frozen=True)
class Imbalanced:
    """Edit the last row of the prefill and every later row, before the softmax."""

    alpha: float = 0.7
    """Strength on local tokens: fine detail, chosen in the tower's first layer."""
    beta: float = 0.3
    """Strength on summary tokens: outliers of the tower's last layer but one."""
    local_token_ratio: float = 0.25
    layers: tuple[int, ...] | None = None
    """Decoder layers, 0-based; None: 2-31 of every 32."""
    head_gain: tuple[float, ...] | None = None
    """A factor on alpha and beta for every head; None: 1. Ours, in place of the paper's unpublished modulation."""
    name = "imbalanced"

    def plan(self, adapter: Adapter) -> Sequence[ProbeStage | EditStage]:
        """Return a probe of the tower and an edit stage; none when nothing is boosted."""
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0.0 <= value < math.inf:
                raise UsageError(f"{name}={value}: expected a finite number >= 0 (0 changes nothing)")
        if not 0.0 <= self.local_token_ratio <= 1.0:
            raise UsageError(f"local_token_ratio={self.local_token_ratio}: expected a share between 0 and 1")
        heads = adapter.text_config.num_attention_heads
        if self.head_gain is not None and len(self.head_gain) != heads:
            raise UsageError(f"head_gain has {len(self.head_gain)} factors; the model has {heads} heads")
        layers = chosen_layers(self.layers, len(adapter.layers), 2, 32)
        idle = self.alpha == self.beta == 0.0 or (self.head_gain is not None and not any(self.head_gain))
        if idle or not layers:
            return []

        def signal(call: AttentionCall) -> Tensor:
            return cls_attention(call, adapter.tower_prefix)

        depth = len(adapter.tower_layers)
        first, penultimate = whole_layer(adapter, range(depth)), whole_layer(adapter, range(max(0, depth - 2), -1, -1))
        signals = {"first": TowerSignal(first, signal), "penultimate": TowerSignal(penultimate, signal)}
        return [ProbeStage(self.see, signals, all_tokens=True), EditStage(layers, self.edit)]

    def see(self, view: ImageView) -> None:
        """Choose the tokens of one image: all its crops together, newlines left out."""
        assert view.tower is not None
        assert view.pack is not None
        patches = view.candidates.nonzero().squeeze(1)
        first, penultimate = (view.pack(view.tower.signals[n], 0.0)[patches, 0] for n in ("first", "penultimate"))
        local, summary = select_tokens(first, penultimate, self.local_token_ratio)
        strength = torch.zeros(len(view.features), device=view.features.device)
        strength[patches[local]], strength[patches[summary]] = self.alpha, self.beta
        view.memory.setdefault("local", {})[view.image] = patches[local]
        view.memory.setdefault("summary", {})[view.image] = patches[summary]
        view.memory.setdefault("strength", {})[view.image] = strength

    def edit(self, view: EditView) -> Tensor:
        """Return the rows' weights (B, H, R, K)."""
        strength = follow(self._strength(view), view.logits.shape[0], view.logits.shape[-1])[:, None, None]
        if self.head_gain is not None:
            strength = strength * torch.tensor(self.head_gain, device=strength.device)[:, None, None]
        return view.softmax(boost(view.logits, strength))

    def _strength(self, view: EditView) -> Tensor:
        """Return the strengths (B, n) of the prompt's keys; they are the same in all layers, as no token is dropped."""
        if "strengths" not in view.memory:
            keys, strengths = view.keys, torch.zeros(view.keys.image_of.shape, device=view.logits.device)
            for image, strength in view.memory.get("strength", {}).items():
                own = keys.image_of == image
                strengths[own] = strength[keys.token_of[own]]
            view.memory["strengths"] = strengths[:, : keys.prompt]
        return view.memory["strengths"]


METHOD = Imbalanced
