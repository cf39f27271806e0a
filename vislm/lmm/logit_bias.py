"""Adding to the attention logits of the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vislm.lmm.decoder import DecoderPart
from vislm.lmm.hooks import Hooks
from vislm.lmm.interventions import BiasStage, BiasView
from vislm.lmm.state import SessionState


class BiasPart:
    """Gives every attention the sum of its stages' biases.

    Keeps the rotary embedding of all columns that the language model has seen, because the keys of a layer may be
    fewer: behind a language stage those of the columns left, with the positions that they were cached with.
    """

    def __init__(self, shared: SessionState, stages: list[tuple[int, BiasStage]], decoder: DecoderPart | None) -> None:
        self.shared, self.stages, self.decoder = shared, stages, decoder
        self._keys: dict[int, tuple[Tensor, Tensor]] = {}

    def install(self, hooks: Hooks) -> None:
        """Add the hooks; after the decoder part's, so that a layer's final rotary embedding is seen."""
        adapter = self.shared.adapter
        for number, (layer, attention) in enumerate(zip(adapter.layers, adapter.attentions, strict=True)):
            wanted = [stage.bias for _, stage in self.stages if stage.layers is None or number in stage.layers]
            if not wanted:
                continue
            hooks.before(layer, lambda module, args, kwargs, n=number: self._remember(n, kwargs))
            hooks.bias(attention, lambda queries, keys, n=number, w=wanted: self._bias(n, w, queries, keys))

    def _remember(self, number: int, kwargs: dict[str, Any]) -> None:
        if self.shared.phase is None:
            return
        cos, sin = kwargs["position_embeddings"]
        if self.shared.phase == "decode" and number in self._keys:
            before = self._keys[number]
            cos, sin = (_append(old, new) for old, new in zip(before, (cos, sin), strict=True))
        self._keys[number] = (cos, sin)

    def _bias(self, number: int, wanted: list, queries: int, keys: int) -> Tensor | None:
        if self.shared.phase is None or number not in self._keys:
            return None
        cos, sin = self._keys[number]
        cos, sin = cos[:, :keys], sin[:, :keys]
        view = BiasView(number, cos, sin, self._sizes(number, keys, cos), queries)
        return torch.stack([bias(view) for bias in wanted]).sum(0)

    def _sizes(self, number: int, keys: int, like: Tensor) -> Tensor:
        prompt = self.shared.prompt
        assert prompt is not None
        segment = self.decoder.segments[number] if self.decoder else None
        size = prompt.size if segment is None else segment.size
        width = (prompt.index if segment is None else segment.index).shape[1]
        if size is None:
            size = torch.ones(prompt.index.shape[0], width, device=like.device)
        return torch.cat([size, size.new_ones(size.shape[0], keys - width)], 1)


def _append(old: Tensor, new: Tensor) -> Tensor:
    """Return (B, K + q, d) of two embeddings of which either may stand for the whole batch."""
    rows = max(old.shape[0], new.shape[0])
    return torch.cat([old.expand(rows, *old.shape[1:]), new.expand(rows, *new.shape[1:])], 1)
