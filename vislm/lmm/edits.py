"""Editing rows of attention in the language model, without its matrix.

The output of all rows comes from the fused call. The few rows that a method edits are computed again explicitly, a
cache-sized piece at a time: logits, the method's new weights, and the heads' outputs from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vislm.lmm.attention import AttentionCall
from vislm.lmm.decoder import DecoderPart, Segment
from vislm.lmm.draft import Drafts
from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.interventions import EditStage, EditView, PrepareView
from vislm.lmm.key_groups import KeyGroups, key_groups
from vislm.lmm.state import SessionState

PIECE = 2**21
"""Logits that are held at once (8 MiB in float32)."""


class EditPart:
    """Gives the edited rows of every attention to its stages, and puts their outputs in place."""

    def __init__(self, shared: SessionState, stages: list[tuple[int, EditStage]], decoder: DecoderPart | None) -> None:
        self.shared, self.stages, self.decoder = shared, stages, decoder
        self.drafts = Drafts(shared, stages)
        self._hidden: Tensor | None = None
        self._groups: tuple[Segment | None, int, Any, KeyGroups] | None = None
        self._images: tuple[Any, bool, bool] = (None, False, False)

    def install(self, hooks: Hooks) -> None:
        """Look at the hidden states that enter a layer, and write drafts, where a stage wants them."""
        self.drafts.install(hooks)
        wanted = {n for _, stage in self.stages if stage.needs_hidden for n in stage.layers}
        for number in wanted:
            hooks.before(self.shared.adapter.layers[number], self._remember)

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.shared.phase == "prefill":
            self._hidden = named_arguments(module, args, kwargs)["hidden_states"]

    def apply(self, number: int, call: AttentionCall, out: Tensor) -> Tensor:
        """Return the heads' output (B, Nq, H, d) of decoder layer ``number`` with its edited rows."""
        shared = self.shared
        for owner, stage in self.stages:
            if number not in stage.layers or not self.drafts.turn_of(owner, stage) or not self._anybody(stage):
                continue
            groups = self._keys(number, call.key.shape[2])
            memory = shared.run.memory[owner]
            self.drafts.hand_over(owner, memory)
            if stage.prepare is not None and shared.phase == "prefill":
                stage.prepare(PrepareView(number, call, groups, memory, self._hidden))
            out = self._edit(number, stage, call, out, groups, memory)
        self._hidden = None
        return out

    def _anybody(self, stage: EditStage) -> bool:
        """Return whether any sample is edited. Read from the device once for a prompt: decode steps should not wait."""
        prompt = self.shared.prompt
        if prompt is not None and self._images[0] is not prompt:
            self._images = (prompt, bool(prompt.has_image.any()), bool(prompt.has_image.all()))
        return prompt is not None and (stage.every_sample or self._images[1])

    def _edit(
        self, number: int, stage: EditStage, call: AttentionCall, out: Tensor, groups: KeyGroups, memory: dict
    ) -> Tensor:
        shared = self.shared
        assert shared.prompt is not None
        heads = None if stage.heads is None else list(stage.heads(number))
        if heads == []:
            return out
        only_row = heads is None and call.query.shape[2] == 1 and (stage.every_sample or self._images[2])
        edited = out
        for rows, mask in self._rows(stage, call, groups):
            view = EditView(
                layer=number,
                phase=shared.phase or "prefill",
                logits=row_logits(call, rows, heads),
                allowed=call.allowed(rows),
                keys=groups,
                rows=rows,
                row_mask=mask if stage.every_sample else mask & shared.prompt.has_image[:, None],
                has_image=shared.prompt.has_image,
                memory=memory,
            )
            weights = stage.edit(view)
            if weights is None:
                continue
            new = call.mix(weights, heads).to(out.dtype)  # (B, R, H', d)
            if only_row:
                return new
            if edited is out:
                edited = out.clone()
            index = (slice(None), rows) if heads is None else (slice(None), rows[:, None], torch.tensor(heads)[None])
            edited[index] = torch.where(view.row_mask[:, :, None, None], new, edited[index])
        return edited

    def _rows(self, stage: EditStage, call: AttentionCall, groups: KeyGroups) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pieces of the rows to edit (R,), and which of them each sample edits (B, R) bool."""
        queries = call.query.shape[2]
        device = call.query.device
        if stage.rows == "last" or queries == 1:
            everyone = torch.ones(call.query.shape[0], 1, dtype=torch.bool, device=device)
            yield torch.arange(queries - 1, queries, device=device), everyone
            return
        if self.shared.phase == "prefill":  # the queries are the first keys (a static cache has an empty tail)
            wanted = (groups.after if stage.rows == "after_image" else groups.valid)[:, :queries]
        else:
            wanted = groups.valid.new_ones(groups.valid.shape[0], queries)
        chosen = wanted.any(0).nonzero().flatten()
        for rows in pieces(call, chosen):
            yield rows, wanted[:, rows]

    def _keys(self, number: int, keys: int) -> KeyGroups:
        segment = self.decoder.segments[number] if self.decoder else None
        known = self._groups
        if known is None or known[0] is not segment or known[1] != keys or known[2] is not self.shared.prompt:
            known = self._groups = (segment, keys, self.shared.prompt, key_groups(self.shared, segment, keys))
        return known[3]


def pieces(call: AttentionCall, rows: Tensor) -> tuple[Tensor, ...]:
    """Return the rows (R,) of a call in pieces whose logits fit the cache."""
    size = max(1, PIECE // (call.query.shape[0] * call.query.shape[1] * call.key.shape[2]))
    return rows.split(size)


def row_logits(call: AttentionCall, rows: Tensor, heads: list[int] | None = None) -> Tensor:
    """Return the logits (B, H', R, Nk) of the rows (R,) in float32, before masking but with what bias stages add."""
    logits, mask = call.logits(rows, heads), call.mask
    if mask is None or mask.dtype == torch.bool:
        return logits
    added = mask[:, :, rows]
    if heads is not None and added.shape[1] > 1:
        added = added[:, heads]
    return logits + torch.where(added > torch.finfo(added.dtype).min / 2, added, 0.0).float()
