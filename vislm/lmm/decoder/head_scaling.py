"""Scaling the output of attention heads in the language model."""

from __future__ import annotations

import torch
from torch import Tensor

from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.decoder.text_stream import TextStream
from vislm.lmm.interventions import HeadStage, HeadView
from vislm.lmm.state import SessionState


class HeadPart:
    """Multiplies head outputs (B, Nq, H, d) by per-sample factors (B, H) before the output projection."""

    def __init__(self, shared: SessionState, stages: list[tuple[int, HeadStage]]) -> None:
        self.shared, self.stages = shared, stages
        self.needs_text = any(stage.text_only != "no" for _, stage in stages)
        self.scales_text = any(stage.text_only == "both" for _, stage in stages)
        self.last_layer = max((n for _, stage in stages for n in stage.layers), default=-1)
        self.text: TextStream | None = None
        self._image_output: Tensor | None = None
        self._factors: Tensor | None = None
        self._shaped: dict[int, tuple[Tensor, Tensor]] = {}
        """Layer -> its last factors, and the same as (B, 1, H, 1) in the output's dtype: they mostly stay the same."""

    @property
    def in_text_stream(self) -> bool:
        """Whether the attention being computed belongs to the text-only stream."""
        return self._image_output is not None

    @property
    def text_tokens(self) -> list[int]:
        """Columns of the text-only stream in each layer that it ran through; empty without one."""
        return [] if self.text is None else [self.text.hidden.shape[1]] * (self.last_layer + 1)

    def start(self, input_ids: Tensor | None, mask: Tensor | None) -> None:
        """Prepare for a prefill of input_ids (B, S), the caller's full prompt."""
        self.text = None
        if self.needs_text and input_ids is not None:
            adapter = self.shared.adapter
            self.text = TextStream(adapter, input_ids, mask)

    def apply(self, number: int, call: AttentionCall, out: Tensor) -> Tensor:
        """Return the scaled output of decoder layer ``number``."""
        if self.in_text_stream:
            return self._in_text_stream(number, out)
        if number > self.last_layer:
            return out
        if self.shared.phase == "decode":
            factors = self._decide(number, out[:, -1], None, "decode")
        elif self.text is not None:
            self._image_output = out[:, -1]
            try:
                self.text.advance(number)
            finally:
                self._image_output = None
            factors, self._factors = self._factors, None
        else:
            factors = self._decide(number, out[:, -1], None, "prefill")
        if factors is None:
            return out
        if self.shared.phase == "prefill":
            self.shared.run.head_factors[number] = factors
        known = self._shaped.get(number)
        if known is None or known[0] is not factors or known[1].dtype != out.dtype:
            known = self._shaped[number] = (factors, factors[:, None, :, None].to(out.dtype))
        return out * known[1]

    def _in_text_stream(self, number: int, out: Tensor) -> Tensor:
        assert self._image_output is not None
        self._factors = self._decide(number, self._image_output, out[:, -1], "prefill")
        if self._factors is None or not self.scales_text:
            return out
        return out * self._factors[:, None, :, None].to(out.dtype)

    def _decide(self, number: int, image_output: Tensor, text_output: Tensor | None, phase: str) -> Tensor | None:
        prompt = self.shared.prompt
        if prompt is None:
            has_image = torch.ones(image_output.shape[0], dtype=torch.bool, device=image_output.device)
        else:
            has_image = prompt.has_image
        factors: Tensor | None = None
        for owner, stage in self.stages:
            if number not in stage.layers:
                continue
            memory = self.shared.run.memory[owner]
            view = HeadView(number, phase, image_output, text_output, has_image, memory)  # pyright: ignore[reportArgumentType]
            chosen = stage.scale(view)
            if chosen is not None:
                factors = chosen if factors is None else factors * chosen
        return factors
