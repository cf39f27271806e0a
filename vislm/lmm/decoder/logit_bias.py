"""Adding to the attention logits of the language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vislm.lmm.decoder.pruning import DecoderPart, Segment
from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.interventions import BiasStage, BiasView
from vislm.lmm.state import SessionState


@dataclass
class Keys:
    """The keys that some decoder layers share: their rotary embedding, and what they were biased with last."""

    segment: Segment | None
    cos: Tensor
    """(B, Nk, d)."""
    sin: Tensor
    shared: dict[int, Tensor] = field(default_factory=dict)
    """Stage -> its bias in this step, for stages that are the same in all layers."""

    def append(self, cos: Tensor, sin: Tensor) -> None:
        """Add the keys of a decode step."""
        self.cos, self.sin = _append(self.cos, cos), _append(self.sin, sin)
        self.shared.clear()


class BiasPart:
    """Gives every attention the sum of its stages' biases.

    Keeps the rotary embedding of all columns that the language model has seen, because the keys of a layer may be
    fewer: behind a language stage those of the columns left, with the positions that they were cached with.
    """

    def __init__(
        self,
        shared: SessionState,
        stages: list[tuple[int, BiasStage]],
        decoder: DecoderPart | None,
        beside: Callable[[], bool],
    ) -> None:
        self.shared, self.stages, self.decoder = shared, [stage for _, stage in stages], decoder
        self.beside = beside
        """Says whether the attention being computed is that of the text-only stream, whose keys are others."""
        self._groups: list[Keys] = []

    def install(self, hooks: Hooks) -> None:
        """Add the hooks; after the decoder part's, so that a layer's final rotary embedding is seen."""
        adapter = self.shared.adapter
        hooks.before(adapter.layers[0], self._start)
        for number, (layer, attention) in enumerate(zip(adapter.layers, adapter.attentions, strict=True)):
            wanted = [n for n, stage in enumerate(self.stages) if stage.layers is None or number in stage.layers]
            if wanted:
                hooks.before(layer, lambda module, args, kwargs, n=number: self._remember(module, n, args, kwargs))
                hooks.bias(attention, lambda queries, keys, n=number, w=wanted: self._bias(n, w, queries, keys))

    def _start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.shared.phase == "prefill":
            self._groups = []

    def _remember(self, module: nn.Module, number: int, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.shared.phase is None:
            return
        arguments = named_arguments(module, args, kwargs)
        cos, sin = arguments["position_embeddings"]
        group = self._group(number)
        if group is None:
            self._groups.append(Keys(self._segment(number), cos, sin))
        elif self.shared.phase == "decode":
            cached = arguments["past_key_values"].layers[number].keys.shape[-2]
            if group.cos.shape[1] < cached + cos.shape[1]:
                group.append(cos, sin)

    def _bias(self, number: int, wanted: list[int], queries: int, keys: int) -> Tensor | None:
        group = self._group(number)
        if self.shared.phase is None or group is None or self.beside():
            return None
        reduced = self._reduced(group)
        if not bool(reduced.any()):
            return None
        view = BiasView(number, group.cos[:, :keys], group.sin[:, :keys], self._sizes(group, keys), queries, reduced)
        parts = []
        for n in wanted:
            stage = self.stages[n]
            part = None if stage.per_layer else group.shared.get(n)
            if part is None:
                part = stage.bias(view)
                if not stage.per_layer:
                    group.shared[n] = part
            parts.append(part)
        return sum(parts[1:], parts[0])

    def _segment(self, number: int) -> Segment | None:
        return self.decoder.segments[number] if self.decoder else None

    def _group(self, number: int) -> Keys | None:
        segment = self._segment(number)
        return next((group for group in self._groups if group.segment is segment), None)

    def _reduced(self, group: Keys) -> Tensor:
        prompt = self.shared.prompt
        assert prompt is not None
        columns = prompt.image_of if group.segment is None else group.segment.image_of
        return (columns >= 0).sum(-1) < prompt.visual

    def _sizes(self, group: Keys, keys: int) -> Tensor:
        prompt = self.shared.prompt
        assert prompt is not None
        index = prompt.index if group.segment is None else group.segment.index
        size = prompt.size if group.segment is None else group.segment.size
        if size is None:
            size = torch.ones(index.shape, device=group.cos.device)
        return torch.cat([size, size.new_ones(size.shape[0], keys - size.shape[1])], 1)


def _append(old: Tensor, new: Tensor) -> Tensor:
    """Return (B, K + q, d) of two embeddings of which either may stand for the whole batch."""
    rows = max(old.shape[0], new.shape[0])
    return torch.cat([old.expand(rows, *old.shape[1:]), new.expand(rows, *new.shape[1:])], 1)
