"""A quirk of VFlowOpt's released code: the layer before stage 2 attends in both directions.

Its prefill asks that layer for attention weights, though nobody uses them; under SDPA the layer then takes the eager
path, which gets no causal mask.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.interventions import LanguageSelection, LanguageStage, LanguageView


def unmasked(adapter: Adapter, stages: list[LanguageStage]) -> list[LanguageStage]:
    """Return the stages with one more in front: the layer before ``stages[0]`` runs again, without its causal mask."""
    second, *later = stages
    number = second.before_layer - 1

    def remember(view: LanguageView) -> Tensor:
        view.memory["entered"] = view.hidden, view.rotary
        return torch.ones_like(view.image_of, dtype=torch.bool)

    def select(view: LanguageView) -> LanguageSelection:
        if len(view.hidden) > 1:
            raise UsageError("vflowopt: unmasked_layer is what the official code does to a batch of one")
        hidden, rotary = view.memory.pop("entered")
        columns = hidden.shape[1]
        layer: Any = adapter.layers[number]
        again = layer.forward(  # not by calling the layer, which has the hooks of the run in progress
            hidden,
            attention_mask=hidden.new_zeros(1, 1, columns, columns),
            position_embeddings=rotary,
        )
        chosen = second.select(view)
        assert isinstance(chosen, Tensor)  # stage 2 merges nothing
        return LanguageSelection(chosen, again)

    first = LanguageStage(number, None, second.signal, remember, expected=lambda alive: alive.tokens)
    return [first, replace(second, select=select), *later]
