"""Editing rows of attention in the language model, without its matrix.

The output of all rows comes from the fused call. The few rows that a method edits are computed again explicitly, a
cache-sized piece at a time: logits, the method's new weights, and the heads' outputs from them. A decode step whose one
row is edited in all heads needs no fused call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vislm.errors import UsageError
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.decoder.grouped_heads import head_index
from vislm.lmm.decoder.key_groups import KeyGroups, KeysInTurn, KnownKeys, first_row
from vislm.lmm.decoder.pruning import DecoderPart
from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.interventions import EditStage, EditView, PrepareView
from vislm.lmm.logits.draft import Drafts
from vislm.lmm.state import PromptMap, SessionState

PIECE = 2**18
"""Logits that are held at once on a CPU (1 MiB in float32, which stays in its cache)."""
_ELSEWHERE = 32
"""Times as many on an accelerator, where a piece has to be worth its start."""


@dataclass
class _Samples:
    """Which samples of a prompt have images, read from the device once: decode steps should not wait for it."""

    prompt: PromptMap
    some: bool
    all: bool


class EditPart:
    """Gives the edited rows of every attention to its stages, and puts their outputs in place."""

    def __init__(self, shared: SessionState, stages: list[tuple[int, EditStage]], decoder: DecoderPart | None) -> None:
        self.shared, self.decoder = shared, decoder
        self.stages = sorted(stages, key=lambda entry: entry[1].observes)  # they see what the others leave
        self.layers = frozenset[int]().union(*(stage.layers for _, stage in stages))
        self.drafts = Drafts(shared, stages)
        self._hidden: Tensor | None = None
        self._keys = KeysInTurn(shared)
        self._samples: _Samples | None = None
        self._left: Tensor | None = None
        """(B, H, 1, K) the last row's weights in this layer, edited; None if they are as they were."""

    def install(self, hooks: Hooks) -> None:
        """Look at the hidden states that enter a layer, and write drafts, where a stage wants them."""
        self.drafts.install(hooks)
        wanted = {n for _, stage in self.stages if stage.needs_hidden for n in stage.layers}
        for number in wanted:
            hooks.before(self.shared.adapter.layers[number], self._remember)

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.shared.phase == "prefill":
            self._hidden = named_arguments(module, args, kwargs)["hidden_states"]

    def apply(self, number: int, call: AttentionCall, fused: Callable[[], Tensor]) -> Tensor:
        """Return the heads' output (B, Nq, H, d) of decoder layer ``number`` with its edited rows.

        Args:
            number: of the layer.
            call: its attention.
            fused: computes the output of all rows; not called where no row of it is left.
        """
        shared, out, self._left = self.shared, None, None
        for owner, stage in self.stages:
            if number not in stage.layers or not self.drafts.turn_of(owner, stage) or not self._anybody(stage):
                continue
            if call.query.shape[2] > 1 and shared.phase == "decode" and (stage.observes or stage.by_row):
                raise UsageError(
                    f"{shared.names[owner]} goes token by token, and {call.query.shape[2]} came at once behind the "
                    "prompt; leave out assistant_model and prompt_lookup_num_tokens, and begin with a new cache"
                )
            known = self._keys.of(self.decoder.segments[number] if self.decoder else None, call.key.shape[2])
            memory = shared.run.memory[owner]
            self.drafts.hand_over(owner, memory)
            if stage.prepare is not None and shared.phase == "prefill":
                stage.prepare(PrepareView(number, call, known.groups, memory, self._hidden))
            if call.query.shape[2] == 1:
                out = self._edit_one(number, stage, call, out, fused, known, memory)
            else:
                out = self._edit(number, stage, call, fused() if out is None else out, known, memory)
        self._hidden = self._left = None
        return fused() if out is None else out

    def _anybody(self, stage: EditStage) -> bool:
        samples = self._whose_images()
        return samples is not None and (stage.every_sample or samples.some)

    def _whose_images(self) -> _Samples | None:
        prompt = self.shared.prompt
        if prompt is None:
            return None
        if self._samples is None or self._samples.prompt is not prompt:
            self._samples = _Samples(prompt, bool(prompt.has_image.any()), bool(prompt.has_image.all()))
        return self._samples

    def _edit_one(
        self,
        number: int,
        stage: EditStage,
        call: AttentionCall,
        out: Tensor | None,
        fused: Callable[[], Tensor],
        known: KnownKeys,
        memory: dict,
    ) -> Tensor | None:
        """Return the output (B, 1, H, d) of a decode step; ``out`` (None: not computed yet) where nothing is edited."""
        samples = self._whose_images()
        assert samples is not None
        heads = None if stage.heads is None else tuple(stage.heads(number))
        if heads == ():
            return out
        everyone = stage.every_sample or samples.all
        has_image = samples.prompt.has_image
        view = EditView(
            layer=number,
            phase=self.shared.phase or "decode",
            logits=row_logits(call, first_row(call.query.device), heads),
            allowed=known.allowed(call),
            keys=known.groups,
            rows=first_row(call.query.device),
            row_mask=torch.ones_like(has_image)[:, None] if stage.every_sample else has_image[:, None],
            has_image=has_image,
            memory=memory,
            edited=self._left if stage.observes else None,
            sees_all=call.sees_all,
        )
        weights = stage.edit(view)
        if weights is None:
            return out
        self._leave(number, call, view, weights, heads)
        new = call.mix(weights, heads)  # (B, 1, H', d)
        if heads is None and everyone:
            return new.to(call.query.dtype)
        if out is None:
            out = fused()
        new = new.to(out.dtype)
        if heads is None:
            return torch.where(view.row_mask[:, :, None, None], new, out)
        index = head_index(heads, out.device)
        if not everyone:
            new = torch.where(view.row_mask[:, :, None, None], new, out.index_select(2, index))
        return out.index_copy(2, index, new)

    def _edit(
        self, number: int, stage: EditStage, call: AttentionCall, out: Tensor, known: KnownKeys, memory: dict
    ) -> Tensor:
        """Return the output ``out`` (B, Nq, H, d) of several rows with the edited ones."""
        shared = self.shared
        assert shared.prompt is not None
        heads = None if stage.heads is None else tuple(stage.heads(number))
        if heads == ():
            return out
        edited = out
        for rows, mask in self._rows(stage, call, known.groups, None if heads is None else len(heads)):
            view = EditView(
                layer=number,
                phase=shared.phase or "prefill",
                logits=row_logits(call, rows, heads),
                allowed=call.allowed(rows),
                keys=known.groups,
                rows=rows,
                row_mask=mask if stage.every_sample else mask & shared.prompt.has_image[:, None],
                has_image=shared.prompt.has_image,
                memory=memory,
                edited=self._left if stage.observes else None,
            )
            weights = stage.edit(view)
            if weights is None:
                continue
            self._leave(number, call, view, weights, heads)
            new = call.mix(weights, heads).to(out.dtype)  # (B, R, H', d)
            if edited is out:
                edited = out.clone()
            index = (slice(None), rows)
            if heads is not None:
                index = (slice(None), rows[:, None], head_index(heads, out.device)[None])
            edited[index] = torch.where(view.row_mask[:, :, None, None], new, edited[index])
        return edited

    def _leave(
        self, number: int, call: AttentionCall, view: EditView, weights: Tensor, heads: tuple[int, ...] | None
    ) -> None:
        """Keep the last row's new weights (B, H', 1, K) for the stages that observe this layer, if there are any."""
        last = call.query.shape[2] - 1
        seen = any(s.observes and number in s.layers and self.drafts.turn_of(owner, s) for owner, s in self.stages)
        if not seen or view.rows[-1] != last:
            return
        left = call.rows(view.rows[-1:]) if self._left is None else self._left
        index = head_index(tuple(range(call.query.shape[1])) if heads is None else heads, left.device)
        new = torch.where(view.row_mask[:, -1:, None, None], weights[:, :, -1:], left[:, index])
        self._left = left.index_copy(1, index, new)

    def _rows(
        self, stage: EditStage, call: AttentionCall, groups: KeyGroups, heads: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pieces of the rows to edit (R,), and which of them each sample edits (B, R) bool."""
        queries = call.query.shape[2]
        device = call.query.device
        if stage.rows == "last" and self.shared.phase == "prefill":
            everyone = torch.ones(call.query.shape[0], 1, dtype=torch.bool, device=device)
            yield torch.arange(queries - 1, queries, device=device), everyone
            return
        if self.shared.phase == "prefill":  # the queries are the first keys (a static cache has an empty tail)
            wanted = (groups.after if stage.rows == "after_image" else groups.valid)[:, :queries]
        else:
            wanted = groups.valid.new_ones(groups.valid.shape[0], queries)
        chosen = wanted.any(0).nonzero().flatten()
        for rows in pieces(call, chosen, heads):
            yield rows, wanted[:, rows]


def pieces(call: AttentionCall, rows: Tensor, heads: int | None = None) -> tuple[Tensor, ...]:
    """Return the rows (R,) of a call in pieces whose logits, of so many heads (None: all), fit the cache."""
    most = PIECE if rows.device.type == "cpu" else PIECE * _ELSEWHERE
    return rows.split(max(1, most // (call.query.shape[0] * (heads or call.query.shape[1]) * call.key.shape[2])))


def row_logits(call: AttentionCall, rows: Tensor, heads: tuple[int, ...] | None = None) -> Tensor:
    """Return the logits (B, H', R, Nk) of the rows (R,) in float32, before masking but with what bias stages add."""
    logits, mask = call.logits(rows, heads), call.mask
    if mask is None or mask.dtype == torch.bool:
        return logits
    added = mask[:, :, rows]
    if heads is not None and added.shape[1] > 1:
        added = added[:, list(heads)]
    return logits + torch.where(added > torch.finfo(added.dtype).min / 2, added, 0.0).float()
