"""Changing the next-token logits where the model returns them, so that every decoding strategy sees the change."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vislm.errors import UsageError
from vislm.lmm.adapters.base import PIXELS
from vislm.lmm.cost.flops import DecoderShape
from vislm.lmm.decoder.row_order import follow_rows, leave_rows
from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.interventions import LogitsStage, LogitsView
from vislm.lmm.logits.contrast import ContrastStream, changed_prompt, copies_of_samples, text_only_prompt
from vislm.lmm.run import clock
from vislm.lmm.state import SessionState, valid_columns


class LogitsPart:
    """Runs the contrast stream beside the model, reads early layers, and lets the stages change the logits.

    Of a prefill the last row changes; of a later step all rows that the model returns (assisted decoding reads them).
    """

    def __init__(
        self,
        shared: SessionState,
        stages: list[tuple[int, LogitsStage]],
        quiet: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.shared, self.stages, self.quiet = shared, stages, quiet
        self.layers = sorted({n for _, stage in stages for n in stage.early_layers})
        self.contrast = next(((owner, stage) for owner, stage in stages if stage.contrast != "none"), None)
        self.stream: ContrastStream | None = None
        self._call: dict[str, Any] = {}
        self._early: dict[int, Tensor] = {}
        self._cache: weakref.ref[Any] | None = None
        self._prompt_keys = 0

    def install(self, hooks: Hooks) -> None:
        """Read what enters the early layers."""
        for number in self.layers:
            hooks.before(
                self.shared.adapter.layers[number],
                lambda module, args, kwargs, n=number: self._remember(module, n, args, kwargs),
            )

    def start(self, kwargs: dict[str, Any], cached: int) -> None:
        """Note the caller's arguments of a forward, before anything shortens the prompt."""
        if not cached:
            self.stop()
        self._call = dict(kwargs)

    def stop(self) -> None:
        """Forget the last prompt, and let go of the caller's cache."""
        leave_rows(None if self._cache is None else self._cache())
        self.stream, self._cache = None, None
        self._call, self._early = {}, {}

    def _remember(self, module: nn.Module, number: int, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.shared.phase is not None:
            hidden = named_arguments(module, args, kwargs)["hidden_states"]
            self._early[number] = hidden[:, -1:] if self.shared.phase == "prefill" else hidden

    def finish(self, phase: Literal["prefill", "decode"], output: Any) -> None:
        """Replace the logits (B, n, V) in the model's output, in float32."""
        if not hasattr(output, "logits"):
            names = " and ".join(self.shared.names[owner] for owner, _ in self.stages)
            raise UsageError(f"{names}: next-token logits are changed; call the model with return_dict=True")
        prompt = self.shared.prompt
        assert prompt is not None
        any_image = bool(prompt.has_image.any())
        acting = [(owner, stage) for owner, stage in self.stages if stage.every_sample or any_image]
        if acting:
            logits = output.logits.float()
            rows = 1 if phase == "prefill" else logits.shape[1]
            contrast = self._contrast(phase, rows, output.past_key_values) if any_image and self.contrast else None
            early = {number: self._project(hidden[:, -rows:]) for number, hidden in self._early.items()}
            new = logits[:, -rows:]
            for owner, stage in acting:
                new = self._adjusted(owner, stage, new, contrast, early, phase)
            output.logits = torch.cat([logits[:, :-rows], new], 1)
        self._call, self._early = {}, {}

    def _adjusted(
        self,
        owner: int,
        stage: LogitsStage,
        logits: Tensor,
        contrast: Tensor | None,
        early: dict[int, Tensor],
        phase: Literal["prefill", "decode"],
    ) -> Tensor:
        assert self.shared.prompt is not None
        has_image = self.shared.prompt.has_image
        rows = [
            stage.adjust(
                LogitsView(
                    logits[:, row],
                    contrast[:, row] if contrast is not None and stage.contrast != "none" else None,
                    {n: early[n][:, row] for n in stage.early_layers},
                    phase,
                    has_image,
                    self.shared.run.memory[owner],
                )
            )
            for row in range(logits.shape[1])
        ]
        new = torch.stack(rows, 1)
        return new if stage.every_sample else torch.where(has_image[:, None, None], new, logits)

    def _project(self, hidden: Tensor) -> Tensor:
        adapter = self.shared.adapter
        return adapter.model.get_output_embeddings()(adapter.language_model.norm(hidden)).float()

    @property
    def _contrast_name(self) -> str:
        assert self.contrast is not None
        return self.shared.names[self.contrast[0]]

    # -- the contrast stream -----------------------------------------------------------------------------------------
    def _contrast(self, phase: Literal["prefill", "decode"], rows: int, cache: Any) -> Tensor:
        """Return its logits (B, rows, V) for the forward that has just run."""
        run, device = self.shared.run, self.shared.adapter.model.device
        started = clock(device)
        if phase == "prefill":
            logits = self._prefill(cache)
        else:
            logits = self._step(rows, cache)
        assert self.stream is not None
        key = f"contrast_{phase}"
        run.seconds[key] = run.seconds.get(key, 0.0) + clock(device) - started
        run.flops[key] = run.flops.get(key, 0) + self._flops(phase, rows)
        run.contrast_kv_bytes = self.stream.kv_bytes
        return logits.float()

    def _prefill(self, cache: Any) -> Tensor:
        assert self.contrast is not None
        owner, stage = self.contrast
        shared, call, ids = self.shared, self._call, self._call["input_ids"]
        mask = valid_columns(call.get("attention_mask"), ids.shape[1])
        copies = copies_of_samples(shared.adapter, ids, shared.encodings)
        if stage.contrast == "text_only":
            prompt = text_only_prompt(shared.adapter, ids[::copies], None if mask is None else mask[::copies])
        else:
            change, memory = stage.pixels, shared.run.memory[owner]
            assert change is not None
            prompt = changed_prompt(
                shared.adapter, call, mask, copies, shared.encodings, lambda piece: change(piece, memory), self.quiet
            )
        self.stream = ContrastStream(shared.adapter, prompt, copies, self.quiet)
        logits = self.stream.prefill(use_cache=cache is not None)
        if cache is not None:
            self._follow(cache)
        return logits

    def _follow(self, cache: Any) -> None:
        """Reorder the stream's cache whenever the caller's is reordered (beam search)."""
        assert self.stream is not None
        follow_rows(cache, self.stream.reorder)
        self._cache, self._prompt_keys = weakref.ref(cache), int(cache.get_seq_length())

    def _step(self, rows: int, cache: Any) -> Tensor:
        call = self._call
        if self.stream is None or self._cache is None or self._cache() is not cache:
            raise UsageError(
                f"the contrast stream of {self._contrast_name} belongs to another cache; pass the whole conversation "
                "again without past_key_values"
            )
        if call.get("mm_encoder_outputs") or any(call.get(name) is not None for name in PIXELS.values()):
            raise UsageError("new images behind a filled cache: a contrast stream needs all images in one prefill")
        tokens = call["input_ids"]
        before = int(cache.get_seq_length()) - self._prompt_keys - tokens.shape[1]
        if before > self.stream.fed:
            raise UsageError("the cache has grown while no method was in force; start with a new cache")
        self.stream.take_back(before)  # assisted decoding takes rejected tokens back
        return self.stream.step(tokens, rows)

    def _flops(self, phase: str, rows: int) -> int:
        adapter, stream = self.shared.adapter, self.stream
        assert stream is not None
        assert self.contrast is not None
        shape = DecoderShape.of(adapter.text_config)
        samples, depth = stream.prompt.ids.shape[0], len(adapter.layers)
        if phase == "decode":
            return samples * stream.copies * rows * shape.decode_flops([stream.columns] * depth)
        tower = self.shared.run.flops.get("full_tower", 0) if self.contrast[1].contrast == "pixels" else 0
        return tower + samples * shape.prefill_flops([stream.columns] * depth)
