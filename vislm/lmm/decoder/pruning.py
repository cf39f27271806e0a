"""Dropping visual tokens inside the language model, between two decoder layers of the prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vislm.errors import PlanConflict, UsageError
from vislm.lmm.choosing.tokens import compact, gather_rows
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.interventions import Kept, LanguageSelection, LanguageStage, LanguageView
from vislm.lmm.prompt.positions import gather_positions, renumber, shifted, text_row
from vislm.lmm.prompt.pruning import refuse_static_cache
from vislm.lmm.state import PromptMap, SessionState, first_layer_keys


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
    token_of: Tensor
    """(B, n) place in the image's full token sequence."""
    size: Tensor | None = None
    """(B, n) original tokens that a column stands for; None: one each."""
    positions: Tensor | None = None
    """(B, n) or (4, B, n) new position ids, with contiguous positions; None keeps the original ones."""
    shift: Tensor | None = None
    """(B, 1) or (4, B, 1): how much smaller they are than the original ones."""

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
        self.signals = {
            stage.signal_layer: (layer, stage)
            for layer, (_, stage) in stages.items()
            if stage.signal_layer not in (None, layer)
        }
        self.segments: list[Segment | None] = []
        self.signal: dict[int, Any] = {}
        self.embeddings: Tensor | None = None

    def install(self, hooks: Hooks) -> None:
        """Add the pre-hooks."""
        layers = self.shared.adapter.layers
        hooks.before(layers[0], self._remember)
        for number in range(min(self.stages), len(layers)):
            hooks.before(
                layers[number], lambda module, args, kwargs, n=number: self._before_layer(module, n, args, kwargs)
            )

    def start(self, cache: Any) -> None:
        """Forget the last prompt."""
        refuse_static_cache(cache)
        self.segments = [None] * len(self.shared.adapter.layers)
        self.signal.clear()

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep the prompt's embeddings until the last stage has seen them."""
        if self.shared.phase == "prefill":
            self.embeddings = args[0] if args else kwargs["hidden_states"]

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
            previous = self.segments[number - 1] if number else None
            segment = previous
            if number in self.stages:
                segment, hidden = self._drop(module, number, arguments, previous)
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
                positions = shifted(self._all_positions(arguments["position_ids"]), segment.shift)
                arguments["position_ids"] = text_row(positions)
                arguments["position_embeddings"] = shared.adapter.rotary(hidden, positions)
        arguments.pop("hidden_states")
        return (hidden,), arguments

    def _drop(
        self, layer: nn.Module, number: int, arguments: dict[str, Any], previous: Segment | None
    ) -> tuple[Segment | None, Tensor]:
        shared, (owner, stage) = self.shared, self.stages[number]
        prompt, hidden = shared.prompt, arguments["hidden_states"]
        assert prompt is not None
        current = previous or _whole(prompt)
        if stage.signal_layer == number:
            with shared.scoring():
                call = self._own_projections(layer, arguments, previous)
            self.signal[number] = stage.signal(call)
        real = self._real_columns(previous)
        view = LanguageView(
            signal=self.signal.pop(number, None),
            image_of=current.image_of,
            memory=shared.run.memory[owner],
            hidden=hidden,
            embeddings=hidden if self.embeddings is None else self.embeddings,
            columns=current.index,
            token_of=current.token_of,
            visual_tokens=shared.run.visual_tokens,
            rotary=self._rotary(arguments, previous),
            size=torch.ones_like(current.index, dtype=torch.float32) if current.size is None else current.size,
        )
        chosen = stage.select(view)
        selection = chosen if isinstance(chosen, LanguageSelection) else LanguageSelection(chosen)
        if number == max(self.stages):
            self.embeddings = None
        if bool((~selection.keep & (current.image_of < 0) & real).any()):
            raise UsageError("a language stage must keep all text columns")
        if bool((selection.keep | ~real).all()) and selection.hidden is None:
            return previous, hidden
        segment, index = _shorten(current, selection, real)
        if stage.positions == "contiguous":
            self._renumber(segment, arguments["position_ids"])
        shared.run.keep_stage(Kept(f"layer {number}", _kept_per_image(segment, len(shared.run.visual_tokens))))
        return segment, gather_rows(hidden if selection.hidden is None else selection.hidden, index)

    def _own_projections(self, layer: nn.Module, arguments: dict[str, Any], segment: Segment | None) -> AttentionCall:
        """Return the attention that this layer would compute for the last row, on the columns alive."""
        hidden = arguments["hidden_states"]
        cos, sin = self._rotary(arguments, segment)
        mask = arguments.get("attention_mask")
        if segment is not None:
            mask = segment.prefill_mask(mask)
        query, key = project_last_query(layer, hidden, cos, sin)
        attention = layer.get_submodule("self_attn")
        scale = float(getattr(attention, "scaling", query.shape[-1] ** -0.5))
        return AttentionCall(query, key, key, None if mask is None else mask[:, :, -1:], False, scale)

    def _rotary(self, arguments: dict[str, Any], segment: Segment | None) -> tuple[Tensor, Tensor]:
        """Return the rotary (cos, sin) of the columns alive."""
        cos, sin = arguments["position_embeddings"]
        if segment is None:
            return cos, sin
        if segment.positions is not None:
            return self.shared.adapter.rotary(arguments["hidden_states"], segment.positions)
        return gather_rows(cos, segment.index), gather_rows(sin, segment.index)

    def _real_columns(self, segment: Segment | None) -> Tensor:
        """Return (B, n) bool: False on padding, be it the caller's or ours."""
        mask, prompt = self.shared.prompt_mask, self.shared.prompt
        assert prompt is not None
        real = torch.ones_like(prompt.index, dtype=torch.bool) if mask is None else mask.bool()
        if segment is None:
            return real
        real = gather_rows(real, segment.index)
        return real if segment.valid is None else real & segment.valid

    def _renumber(self, segment: Segment, position_ids: Tensor | None) -> None:
        prompt, positions = self.shared.prompt, self._all_positions(position_ids)
        assert prompt is not None
        real = self._real_columns(segment)
        segment.positions, segment.shift = renumber(positions, segment.index, real, prompt.image_of)

    def _all_positions(self, position_ids: Tensor | None) -> Tensor:
        """Return the positions of a forward, with all rows of M-RoPE, of which layers are told the text's at most."""
        positions = self.shared.positions
        if positions is None or positions.dim() == 2:
            positions = position_ids
        assert positions is not None
        return positions

    def _positions(self, arguments: dict[str, Any], segment: Segment, hidden: Tensor) -> None:
        if segment.positions is not None:
            arguments["position_ids"] = text_row(segment.positions)
            arguments["position_embeddings"] = self.shared.adapter.rotary(hidden, segment.positions)
            return
        cos, sin = arguments["position_embeddings"]
        arguments["position_embeddings"] = (gather_rows(cos, segment.index), gather_rows(sin, segment.index))
        positions = arguments["position_ids"]
        arguments["position_ids"] = None if positions is None else gather_positions(positions, segment.index)


def project_last_query(layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return a decoder layer's query (B, H, 1, d) of the last row and keys (B, G, S, d), rotated, of hidden (B, S, C).

    Raises:
        PlanConflict: a layer without separate query and key projections.
    """
    attention = layer.get_submodule("self_attn")
    if not (hasattr(attention, "q_proj") and hasattr(attention, "k_proj")):
        raise PlanConflict(f"{type(attention).__name__} has no q_proj and k_proj; rank by an earlier layer instead")
    normed = layer.get_submodule("input_layernorm")(hidden)

    def rotated(name: str, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = attention.get_submodule(f"{name}_proj")(rows).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        x = (x if norm is None else norm(x)).transpose(1, 2)
        first, second = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)

    return rotated("q", normed[:, -1:], cos[:, -1:], sin[:, -1:]), rotated("k", normed, cos, sin)


def _whole(prompt: PromptMap) -> Segment:
    """Return the segment of all columns that entered the language model."""
    rows, width = prompt.index.shape
    index = torch.arange(width, device=prompt.index.device).expand(rows, width)
    return Segment(index, None, width, prompt.image_of, prompt.token_of, prompt.size)


def _shorten(current: Segment, selection: LanguageSelection, real: Tensor) -> tuple[Segment, Tensor]:
    """Return the segment that a selection leaves, and the local indices (B, n) of its columns."""
    index, valid = compact(selection.keep & real, pad="left")
    size = current.size if selection.size is None else selection.size
    segment = Segment(
        current.index.gather(1, index),
        valid,
        current.prompt_length,
        gather_rows(current.image_of, index),
        gather_rows(current.token_of, index),
        None if size is None else gather_rows(size, index),
    )
    if valid is not None:
        segment.image_of = segment.image_of.masked_fill(~valid, -1)
        segment.token_of = segment.token_of.masked_fill(~valid, -1)
    return segment, index


def _kept_per_image(segment: Segment, images: int) -> list[list[int]]:
    """Return, for every image, which of its full tokens are left."""
    return [segment.token_of[segment.image_of == image].tolist() for image in range(images)]
