"""Importance of every head of an LMM's decoder: what the next token loses when the head's output is zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vislm.analysis.entropy import DormantHeads
from vislm.analysis.importance import PROXY
from vislm.analysis.metrics import METRICS, Prediction, effects
from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.hooks import Hooks
from vislm.lmm.interventions import HeadStage, HeadView
from vislm.lmm.model import LMM, ImageSource
from vislm.lmm.session import attach


@dataclass(frozen=True, eq=False)
class HeadFactors:
    """Multiply head outputs before the output projection, at every position."""

    factors: dict[int, Tensor] = field(default_factory=dict)
    """Decoder layer -> (B, H)."""
    name = "head_factors"

    def plan(self, adapter: Adapter) -> Sequence[HeadStage]:
        """Return one head stage; none without factors."""
        return [HeadStage(frozenset(self.factors), self._scale)] if self.factors else []

    def _scale(self, view: HeadView) -> Tensor:
        return self.factors[view.layer]


def next_token(model: Any, inputs: dict[str, Tensor], *interventions: Any) -> Prediction:
    """Return logits and features (B, ...) of the token behind a batch of prompts (padded on the left)."""
    seen: list[Tensor] = []
    hooks = Hooks()
    hooks.before(_output_embedding(model), lambda module, args, kwargs: seen.append(args[0][:, -1]))
    try:
        with attach(model, *interventions):
            logits = model(**inputs, use_cache=False).logits[:, -1]
    finally:
        hooks.remove()
    return Prediction(logits, seen[-1])


def lmm_head_importance(
    lmm: LMM,
    image: ImageSource | None,
    question: str,
    token: int | None = None,
    *,
    rows: int = 8,
) -> dict[str, Tensor]:
    """Return metric -> (L, H) of one question: what the answer's first token loses without one head at a time.

    ``probability_drop`` is the head's influence on that token; contrast it between right and hallucinated words to find
    hallucination heads. Takes L * H prefills, ``rows`` of them at a time.

    Args:
        lmm: the model.
        image: a picture, or None.
        question: plain text.
        token: id of the token asked about; None: what the whole model says.
        rows: prompts per forward pass.
    """
    if rows < 1:
        raise UsageError(f"{rows=}: expected at least one prompt per forward pass")
    config = lmm.adapter.text_config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    single = lmm.prepare([image], [question])
    device = single["input_ids"].device
    with torch.no_grad():
        base = next_token(lmm.model, single)
        assert base.logits is not None
        label = base.logits.argmax(-1) if token is None else torch.tensor([token], device=device)
        maps = {name: torch.zeros(layers, heads, dtype=torch.float64) for name in METRICS}
        pairs = torch.cartesian_prod(torch.arange(layers), torch.arange(heads))
        for part in pairs.split(rows):
            inputs = lmm.prepare([image] * len(part), [question] * len(part))
            factors = {}
            for layer in part[:, 0].unique().tolist():
                own = torch.ones(len(part), heads, device=device)
                mine = part[:, 0] == layer
                own[mine.nonzero().flatten(), part[mine, 1]] = 0.0
                factors[layer] = own
            without = next_token(lmm.model, inputs, HeadFactors(factors))
            repeated = Prediction(base.logits.expand(len(part), -1), base.features.expand(len(part), -1))
            for name, change in effects(repeated, without, label.expand(len(part))).items():
                maps[name][part[:, 0], part[:, 1]] = change.cpu()
    return {**{name: value.float() for name, value in maps.items()}, PROXY: lmm_first_order(lmm, single, label)}


def lmm_first_order(lmm: LMM, inputs: dict[str, Tensor], label: Tensor) -> Tensor:
    """Return (L, H): |d loss / d gate| at a gate of 1 on every head, loss of token label (B,); one backward pass."""
    config = lmm.adapter.text_config
    batch = len(inputs["input_ids"])
    gates = {
        layer: torch.ones(batch, config.num_attention_heads, device=label.device, requires_grad=True)
        for layer in range(config.num_hidden_layers)
    }
    with torch.enable_grad():
        logits = next_token(lmm.model, inputs, HeadFactors(gates)).logits
        assert logits is not None
        loss = torch.nn.functional.cross_entropy(logits.float(), label, reduction="sum")
        found = torch.autograd.grad(loss, list(gates.values()))
    return torch.stack([gradient.abs().mean(0) for gradient in found]).cpu()


def _output_embedding(model: Any) -> nn.Module:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise UsageError(f"{type(model).__name__} has no output embedding")
    return head


def dormant_effects(
    lmm: LMM,
    image: ImageSource | None,
    question: str,
    mode: Literal["zero", "first"] = "first",
    token: int | None = None,
) -> Tensor:
    """Return (L, H): rise of the loss of the answer's first token when one head is made dormant; L * H prefills.

    Args:
        lmm: the model.
        image: a picture, or None.
        question: plain text.
        mode: the head's attention is zero, or on the first token alone.
        token: id of the token; None: what the whole model says.
    """
    inputs = lmm.prepare([image], [question])
    config = lmm.adapter.text_config
    rise = torch.zeros(config.num_hidden_layers, config.num_attention_heads)
    with torch.no_grad():
        base = _log_probabilities(lmm, inputs)
        own = int(base.argmax()) if token is None else token
        for layer in range(rise.shape[0]):
            for head in range(rise.shape[1]):
                without = _log_probabilities(lmm, inputs, DormantHeads({layer: [head]}, mode))
                rise[layer, head] = base[own] - without[own]
    return rise


def _log_probabilities(lmm: LMM, inputs: dict[str, Tensor], *interventions: DormantHeads) -> Tensor:
    logits = next_token(lmm.model, inputs, *interventions).logits
    assert logits is not None
    return logits[0].double().log_softmax(-1)
