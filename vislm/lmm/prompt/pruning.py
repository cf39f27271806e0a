"""Dropping visual tokens before the language model, and the bookkeeping of prompt columns that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.choosing.tokens import compact, gather_rows, index_in_images
from vislm.lmm.interventions import ImageView, Kept, Positions, ProbeStage, PromptStage, Selection
from vislm.lmm.prompt.positions import gather_positions, next_positions, renumber, shifted
from vislm.lmm.prompt.visuals import Origin, Visuals
from vislm.lmm.state import PromptMap, SessionState, valid_columns
from vislm.lmm.tower.merging import with_tower_merges
from vislm.lmm.tower.record import SESSION, TowerRecorder


class PromptPart:
    """Shortens a prefill's prompt and translates the caller's masks and positions during decoding.

    ``generate`` keeps counting in columns of the full prompt: its position ids stay as they are (original positions) or
    are shifted (contiguous positions), its attention mask is gathered. So the caller needs to know nothing, and
    the returned sequences still begin with the full prompt.
    """

    def __init__(
        self,
        shared: SessionState,
        stages: list[tuple[int, PromptStage | ProbeStage]],
        drops: bool,
        positions: Positions,
        tower_merges: bool = False,
    ) -> None:
        self.shared, self.stages, self.drops, self.positions = shared, stages, drops, positions
        wanted = {(owner, name): signal for owner, stage in stages for name, signal in stage.tower.items()}
        asked = bool(wanted) or tower_merges or any(stage.needs_tower for _, stage in stages)
        self.tower_merges = tower_merges
        self.recorder = TowerRecorder(shared, wanted) if asked else None
        self._origins: list[Origin] = []

    def prefill(self, kwargs: dict[str, Any]) -> PromptMap:
        """Shorten the prompt in ``kwargs`` of the model's forward, in place; return the map."""
        ids = kwargs.get("input_ids")
        if ids is None:
            raise UsageError("pass input_ids, not inputs_embeds: the image placeholders cannot be seen in embeddings")
        mask = valid_columns(kwargs.get("attention_mask"), ids.shape[1])
        self.shared.adapter.encode(kwargs)
        visuals = Visuals.read(self.shared.adapter, ids, kwargs.get("mm_encoder_outputs"))
        features, is_image, image_of = visuals.features, visuals.is_visual, visuals.image_of
        self._describe(visuals)
        token_of = index_in_images(image_of)
        has_image, visual = is_image.any(-1), is_image.sum(-1)
        index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        whole = PromptMap(ids.shape[1], index, None, image_of, has_image, token_of, visual)
        whole.next_position = self._place(kwargs)
        if not self.drops or features is None:
            return whole

        text = ~is_image if mask is None else ~is_image & mask.bool()
        chosen = [self._select(n, f, image_of, ids, text) for n, f in enumerate(features)]
        if self.tower_merges:
            chosen = [self._count_merged(n, f, c) for n, (f, c) in enumerate(zip(features, chosen, strict=True))]
        self.shared.run.keep_stage(_kept(chosen))
        keep = torch.ones_like(is_image)
        keep[is_image] = torch.cat([c.keep for c in chosen]).to(keep.device)
        if bool(keep.all()) and all(c.features is None for c in chosen):
            return whole
        refuse_static_cache(kwargs.get("past_key_values"))
        if mask is not None:
            keep &= mask.cumsum(-1) > 0  # the caller's left padding goes first; what is still needed comes back
        index, valid = compact(keep, pad="left")
        prompt = PromptMap(
            ids.shape[1], index, valid, gather_rows(image_of, index), has_image, gather_rows(token_of, index), visual
        )
        prompt.untouched = False
        prompt.size = _sizes(chosen, is_image, index)
        if valid is not None:
            prompt.image_of = prompt.image_of.masked_fill(~valid, -1)
            prompt.token_of = prompt.token_of.masked_fill(~valid, -1)
        left = [f[c.keep] if c.features is None else c.features for f, c in zip(features, chosen, strict=True)]
        kwargs["mm_encoder_outputs"] = visuals.shortened([c.keep for c in chosen], left)
        self._shorten(kwargs, prompt, mask, image_of)
        return prompt

    def _describe(self, visuals: Visuals) -> None:
        """Note what the images are: their features, the calls that encoded them, the grids of their tokens."""
        run, adapter, encodings = self.shared.run, self.shared.adapter, self.shared.encodings
        self._origins = visuals.origins(encodings)
        spans = {name: adapter.spans(encoding.arguments) for name, encoding in encodings.items()}
        run.features = visuals.features
        run.spans = [spans[o.modality][o.entries[0]] if len(o.entries) == 1 else None for o in self._origins]

    def _place(self, kwargs: dict[str, Any]) -> Tensor | None:
        """Give a prompt of M-RoPE its positions, which nobody can tell from a shorter one; return those of the next."""
        adapter, ids, mask = self.shared.adapter, kwargs["input_ids"], kwargs.get("attention_mask")
        if not adapter.grid_positions or isinstance(mask, Mapping) or (mask is not None and mask.dim() != 2):
            return None
        mask = torch.ones_like(ids) if mask is None else mask
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = adapter.positions(kwargs, mask)
        if positions.dim() == 2:
            return None
        kwargs["position_ids"] = positions
        return next_positions(positions, mask)

    def _select(self, number: int, features: Tensor, image_of: Tensor, ids: Tensor, text: Tensor) -> Selection:
        dropped = features.isnan().all(-1)  # the tower's verdict
        keep = ~dropped
        candidates = keep & self.shared.adapter.is_patch(features)
        if bool(dropped.any()):
            keep = candidates  # separators of a thinned grid separate nothing
        sample = int((image_of == number).any(-1).nonzero()[0])
        for owner, stage in self.stages:
            view = ImageView(features, candidates, sample, number, self.shared.run.memory[owner])
            view.span = self.shared.run.spans[number]
            view.text_ids = ids[sample][text[sample]]
            if self.shared.questions:
                if len(ids) % len(self.shared.questions):  # beams repeat the samples
                    raise UsageError(f"{len(self.shared.questions)} questions were given for {len(ids)} prompts")
                view.question = self.shared.questions[sample * len(self.shared.questions) // len(ids)]
            if self.recorder is not None:
                self.recorder.show(view, owner, self._origins[number])
            if isinstance(stage, ProbeStage):
                stage.see(view)
                continue
            chosen = stage.select(view)
            if isinstance(chosen, Selection):
                return _checked(chosen, features, dropped)
            if not bool(chosen[candidates].all()):
                keep = chosen & candidates
        return Selection(keep)

    def _count_merged(self, number: int, features: Tensor, chosen: Selection) -> Selection:
        """Add what the tower has merged, if it encoded this image in the session."""
        origin = self._origins[number]
        if self.recorder is None or origin.modality not in self.shared.encodings:
            return chosen
        view = ImageView(features, ~features.isnan().all(-1), 0, number, {})
        self.recorder.show(view, SESSION, origin)
        return with_tower_merges(chosen, view)

    def _shorten(self, kwargs: dict[str, Any], prompt: PromptMap, mask: Tensor | None, image_of: Tensor) -> None:
        index = prompt.index
        ids = kwargs["input_ids"]
        full_mask = torch.ones_like(ids) if mask is None else mask
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = self.shared.adapter.positions(kwargs, full_mask)
        prompt.next_position = next_positions(positions, full_mask)
        new_mask = gather_rows(full_mask, index)
        new_ids = gather_rows(ids, index)
        if prompt.valid is not None:
            new_mask = new_mask * prompt.valid
            # padding must not look like an image placeholder
            new_ids = new_ids.masked_fill(~prompt.valid & self.shared.adapter.is_visual(new_ids), 0)
        if self.positions == "contiguous":
            positions, prompt.shift = renumber(positions, index, new_mask.bool(), image_of)
        else:
            positions = gather_positions(positions, index)
        kwargs.update(input_ids=new_ids, attention_mask=new_mask, position_ids=positions)
        for name in ("labels", "mm_token_type_ids", "token_type_ids"):
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name] = gather_rows(kwargs[name], index)

    def decode(self, kwargs: dict[str, Any], prompt: PromptMap, cached: int) -> None:
        """Translate the kwargs of a later forward with ``cached`` keys in the first layer, in place."""
        ids = kwargs.get("input_ids")
        new = ids.shape[1] if ids is not None else kwargs["inputs_embeds"].shape[1]
        if prompt.untouched:
            if kwargs.get("position_ids") is None and prompt.next_position is not None:
                kwargs["position_ids"] = prompt.following(cached, new)
            return
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and mask.dim() == 2:
            seen = mask.shape[-1]
        else:  # no padding, so the text's positions count columns
            counted = None if positions is None else self.shared.adapter.counted(positions)
            seen = cached + prompt.removed + new if counted is None else int(counted.max()) + 1
        if seen != cached + prompt.removed + new or (kwargs.get("mm_encoder_outputs") or {}):
            raise UsageError(
                "this cache holds a pruned prompt, which a new generate() cannot continue; pass the whole conversation "
                "again without past_key_values"
            )
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([gather_rows(mask, prompt.index), mask[:, prompt.length :]], 1)
        elif prompt.valid is not None:
            tail = prompt.valid.new_ones(prompt.valid.shape[0], cached + new - prompt.index.shape[1])
            kwargs["attention_mask"] = torch.cat([prompt.valid, tail], 1).long()
        if prompt.valid is not None and mask is not None:
            kwargs["attention_mask"][:, : prompt.index.shape[1]] *= prompt.valid
        if positions is None:
            positions = prompt.following(cached, new)
        kwargs["position_ids"] = positions if prompt.shift is None else shifted(positions, prompt.shift)


def _checked(chosen: Selection, features: Tensor, dropped: Tensor) -> Selection:
    """Return a stage's selection if it fits the image's n tokens."""
    kept = int(chosen.keep.sum())
    if chosen.keep.shape != features.shape[:1] or not kept:
        raise UsageError(f"a prompt stage must keep some of {len(features)} tokens; got {tuple(chosen.keep.shape)}")
    if chosen.features is None:
        if bool((chosen.keep & dropped).any()):
            raise UsageError("a prompt stage kept tokens that the vision tower had dropped")
    elif chosen.features.shape != (kept, features.shape[1]):
        raise UsageError(f"{kept} seats are kept, but the new tokens have the shape {tuple(chosen.features.shape)}")
    else:
        chosen = replace(chosen, features=chosen.features.to(features))
    return chosen


def _kept(chosen: list[Selection]) -> Kept:
    merged = any(c.source is not None for c in chosen)
    return Kept(
        "prompt",
        [c.keep.nonzero().flatten().tolist() for c in chosen],
        [(torch.where(c.keep, c.keep.cumsum(0) - 1, -1) if c.source is None else c.source).tolist() for c in chosen]
        if merged
        else None,
    )


def _sizes(chosen: list[Selection], is_image: Tensor, index: Tensor) -> Tensor | None:
    """Return (B, n) how many original tokens the columns ``index`` stand for; None if nothing was merged."""
    if all(c.size is None for c in chosen):
        return None
    sizes = torch.ones(is_image.shape, dtype=torch.float32, device=is_image.device)
    parts = []
    for c in chosen:
        part = torch.ones(c.keep.shape, dtype=torch.float32)
        if c.size is not None:
            part[c.keep.cpu()] = c.size.float().cpu()
        parts.append(part)
    sizes[is_image] = torch.cat(parts).to(sizes.device)
    return gather_rows(sizes, index)


def refuse_static_cache(cache: Any, name: str = "token pruning") -> None:
    """Raise ``UsageError`` for a cache whose layers have a fixed length; ``name`` says what cannot use it."""
    if cache is not None and getattr(cache, "is_compileable", False):
        raise UsageError(f"{name} needs a dynamic cache; leave cache_implementation unset (or 'dynamic')")
