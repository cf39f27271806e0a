"""Dropping visual tokens inside the language model, between two decoder layers of the prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vislm.errors import UsageError
from vislm.lmm.attention import AttentionCall
from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.interventions import Kept, LanguageStage, LanguageView
from vislm.lmm.prompt import refuse_static_cache
from vislm.lmm.state import PromptMap, SessionState, first_layer_keys
from vislm.lmm.tokens import compact, gather_rows


@dataclass
class Segment:
    """The columns alive in a run of decoder layers. P columns of the (already shortened) prompt, n of them left."""

    index: Tensor
    """(B, n) columns of the prompt as it entered the language model."""
    valid: Tensor | None
    """(B, n) bool, False on padding; None if there is none."""
    prompt_length: int
    """P."""
    image_of: Tensor
    """(B, n)."""
    positions: Tensor | None = None
    """(B, n) new position ids, with contiguous positions; None keeps the original ones."""
    shift: Tensor | None = None
    """(B, 1) how much smaller they are than the original ones."""

    def prefill_mask(self, mask: Tensor | None) -> Tensor | None:
        """Return the mask (B, 1, n, n) of this segment's prefill from that of the whole prompt (B, 1, P, P)."""
        if mask is None and self.valid is None:
            return None  # plain causal attention on a shorter sequence
        rows, width = self.index.shape
        if mask is None:
            mask = torch.ones(1, 1, self.prompt_length, self.prompt_length, dtype=torch.bool, device=self.index.device)
            mask = mask.tril()
        mask = mask.expand(rows, mask.shape[1], *mask.shape[2:])
        mask = mask.gather(2, self.index[:, None, :, None].expand(rows, mask.shape[1], width, mask.shape[3]))
        mask = mask.gather(3, self.index[:, None, None, :].expand(rows, mask.shape[1], width, width))
        return self._hide_padding(mask, self_attend=True)

    def decode_mask(self, mask: Tensor | None, keys: int) -> Tensor | None:
        """Return the mask (B, 1, q, n + new) of a decode step from that of all keys (B, 1, q, P + new)."""
        if mask is None and self.valid is None:
            return None
        rows, width = self.index.shape
        if mask is None:
            mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=self.index.device)
        mask = mask.expand(rows, mask.shape[1], mask.shape[2], mask.shape[3])
        columns = self.index[:, None, None, :].expand(rows, mask.shape[1], mask.shape[2], width)
        kept = self._hide_padding(mask.gather(3, columns), self_attend=False)
        return torch.cat([kept, mask[..., self.prompt_length :]], -1)

    def _hide_padding(self, mask: Tensor, self_attend: bool) -> Tensor:
        if self.valid is None:
            return mask
        hidden = ~self.valid[:, None, None, :]
        if self_attend:  # a row without any key would be NaN; padding may see itself and nothing else sees it
            hidden = hidden & ~torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
            own = ~self.valid[:, None, :, None] & torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
            if mask.dtype == torch.bool:
                return (mask & ~hidden) | own
            return mask.masked_fill(hidden, torch.finfo(mask.dtype).min).masked_fill(own, 0.0)
        return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


class DecoderPart:
    """Hooks on the decoder layers from the first stage on.

    The model's loop goes on passing the full prompt's mask, positions and rotary embedding to every layer; behind a
    stage the hooks replace them by those of the columns that are left. At decode a hidden state has length 1 and only
    the mask has to follow (and the rotary embedding, with contiguous positions).
    """

    def __init__(self, shared: SessionState, stages: dict[int, tuple[int, LanguageStage]]) -> None:
        self.shared, self.stages = shared, stages
        self.signals = {stage.signal_layer: (layer, stage) for layer, (_, stage) in stages.items()}
        self.segments: list[Segment | None] = []
        self.signal: dict[int, Any] = {}

    def install(self, hooks: Hooks) -> None:
        """Add the pre-hooks."""
        layers = self.shared.adapter.layers
        for number in range(min(self.stages), len(layers)):
            hooks.before(
                layers[number], lambda module, args, kwargs, n=number: self._before_layer(module, n, args, kwargs)
            )

    def start(self, cache: Any) -> None:
        """Forget the last prompt."""
        refuse_static_cache(cache)
        self.segments = [None] * len(self.shared.adapter.layers)
        self.signal.clear()

    def observe(self, number: int, call: AttentionCall) -> None:
        """Take the signals that are due in decoder layer ``number`` of a prefill."""
        if number in self.signals:
            layer, stage = self.signals[number]
            self.signal[layer] = stage.signal(call)

    def _before_layer(self, module: nn.Module, number: int, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        shared = self.shared
        if shared.phase is None or shared.prompt is None:
            return None
        arguments = named_arguments(module, args, kwargs)
        hidden = arguments["hidden_states"]
        if shared.phase == "prefill":
            previous = self.segments[number - 1]
            segment = previous
            if number in self.stages:
                segment, hidden = self._drop(number, hidden, previous, arguments["position_ids"])
            self.segments[number] = segment
            if segment is None:
                return None
            arguments["attention_mask"] = segment.prefill_mask(arguments.get("attention_mask"))
            self._positions(arguments, segment, hidden)
        else:
            segment = self.segments[number]
            if segment is None:
                return None
            arguments["attention_mask"] = segment.decode_mask(
                arguments.get("attention_mask"), first_layer_keys(arguments["past_key_values"])
            )
            if segment.shift is not None:
                positions = arguments["position_ids"] - segment.shift
                arguments["position_ids"] = positions
                arguments["position_embeddings"] = shared.adapter.rotary(hidden, positions)
        arguments.pop("hidden_states")
        return (hidden,), arguments

    def _drop(
        self, number: int, hidden: Tensor, previous: Segment | None, position_ids: Tensor
    ) -> tuple[Segment | None, Tensor]:
        shared, (owner, stage) = self.shared, self.stages[number]
        prompt = shared.prompt
        assert prompt is not None
        image_of = previous.image_of if previous else prompt.image_of
        real = self._real_columns(previous)
        keep = stage.select(LanguageView(self.signal.pop(number), image_of, shared.run.memory[owner]))
        if bool((~keep & (image_of < 0) & real).any()):
            raise UsageError("a language stage must keep all text columns")
        if bool((keep | ~real).all()):
            return previous, hidden
        index, valid = compact(keep & real, pad="left")
        before = previous.index if previous else torch.arange(hidden.shape[1], device=hidden.device).expand_as(keep)
        segment = Segment(before.gather(1, index), valid, prompt.index.shape[1], gather_rows(image_of, index))
        if segment.valid is not None:
            segment.image_of = segment.image_of.masked_fill(~segment.valid, -1)
        if stage.positions == "contiguous":
            self._renumber(segment, position_ids)
        shared.run.keep_stage(Kept(f"layer {number}", _kept_per_image(segment, prompt, shared.run.stages)))
        return segment, gather_rows(hidden, index)

    def _real_columns(self, segment: Segment | None) -> Tensor:
        """Return (B, n) bool: False on padding, be it the caller's or ours."""
        mask, prompt = self.shared.prompt_mask, self.shared.prompt
        assert prompt is not None
        real = torch.ones_like(prompt.index, dtype=torch.bool) if mask is None else mask.bool()
        if segment is None:
            return real
        real = gather_rows(real, segment.index)
        return real if segment.valid is None else real & segment.valid

    def _renumber(self, segment: Segment, position_ids: Tensor) -> None:
        original = gather_rows(position_ids.expand(segment.index.shape[0], -1), segment.index)
        segment.positions = (self._real_columns(segment).cumsum(-1) - 1).clamp(min=0)
        segment.shift = original[:, -1:] - segment.positions[:, -1:]

    def _positions(self, arguments: dict[str, Any], segment: Segment, hidden: Tensor) -> None:
        if segment.positions is not None:
            arguments["position_ids"] = segment.positions
            arguments["position_embeddings"] = self.shared.adapter.rotary(hidden, segment.positions)
            return
        cos, sin = arguments["position_embeddings"]
        arguments["position_embeddings"] = (gather_rows(cos, segment.index), gather_rows(sin, segment.index))
        positions = arguments["position_ids"]
        arguments["position_ids"] = gather_rows(positions.expand(hidden.shape[0], -1), segment.index)


def _kept_per_image(segment: Segment, prompt: PromptMap, stages: list[Kept]) -> list[list[int]]:
    """Return, for every image, which of its full tokens are left."""
    before = next((stage.index for stage in stages if stage.where == "prompt"), None)
    kept: list[list[int]] = []
    for image in range(int(prompt.image_of.max()) + 1):
        row = int((prompt.image_of == image).any(-1).nonzero()[0])
        columns = (prompt.image_of[row] == image).nonzero().flatten()
        alive = segment.index[row][segment.image_of[row] == image]
        order = torch.searchsorted(columns, alive).tolist()
        kept.append([before[image][i] for i in order] if before else order)
    return kept
