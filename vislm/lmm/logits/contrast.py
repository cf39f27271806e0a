"""The same model run beside itself, with a cache of its own: a second opinion on every next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.adapters.base import PIXELS
from vislm.lmm.choosing.tokens import compact, gather_rows
from vislm.lmm.prompt.positions import next_positions
from vislm.lmm.prompt.visuals import Encoding

PixelChange = Callable[[Tensor], Tensor]
"""Gets the normalised pixels of one crop, or of one packed image, and returns others of the same shape."""


@dataclass
class ContrastPrompt:
    """What the stream reads instead of the caller's prompt. S columns, padding on the left."""

    ids: Tensor
    """(B, S)."""
    valid: Tensor | None
    """(B, S) bool, None without padding."""
    positions: Tensor
    """(B, S) or (4, B, S)."""
    more: dict[str, Any]
    """Further arguments of the prefill: encoded images, token types."""


class ContrastStream:
    """One prefill and the steps that follow it, without any intervention and without gradients."""

    def __init__(
        self, adapter: Adapter, prompt: ContrastPrompt, copies: int, quiet: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.adapter, self.prompt, self.copies, self.quiet = adapter, prompt, copies, quiet
        self.fed = 0
        """Tokens behind the prompt."""
        self.cache: Any = None
        mask = torch.ones_like(prompt.ids) if prompt.valid is None else prompt.valid.long()
        positions = prompt.positions.expand(*prompt.positions.shape[:-2], *prompt.ids.shape)
        self._next = next_positions(positions, mask).repeat_interleave(copies, -2)
        self._valid = None if prompt.valid is None else prompt.valid.repeat_interleave(copies, 0)

    def prefill(self, use_cache: bool = True) -> Tensor:
        """Return the next-token logits (B * copies, 1, V); samples that were repeated (beams) are run once."""
        prompt = self.prompt
        out = self._run(
            input_ids=prompt.ids,
            attention_mask=None if prompt.valid is None else prompt.valid.long(),
            position_ids=prompt.positions,
            use_cache=use_cache,
            logits_to_keep=1,
            **prompt.more,
        )
        prompt.more.clear()
        if use_cache:
            self.cache = out.past_key_values
            if self.copies > 1:
                self.cache.batch_repeat_interleave(self.copies)
        return out.logits.repeat_interleave(self.copies, 0)

    def step(self, tokens: Tensor, rows: int) -> Tensor:
        """Return the logits (B, rows, V) of the last rows of new tokens (B, n)."""
        new = tokens.shape[1]
        mask = self._valid
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], self.fed + new)], 1).long()
        positions = self._next + torch.arange(self.fed, self.fed + new, device=tokens.device)
        out = self._run(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=rows,
        )
        self.fed += new
        return out.logits

    def take_back(self, fed: int) -> None:
        """Forget all but the first ``fed`` tokens behind the prompt."""
        if fed < self.fed:
            self.cache.crop(fed - self.fed)
            self.fed = fed

    def reorder(self, beams: Tensor) -> None:
        """Let row i continue what row ``beams[i]`` was."""
        if self.cache is not None:
            self.cache.reorder_cache(beams)

    @property
    def columns(self) -> int:
        """Columns that the stream holds."""
        return self.prompt.ids.shape[1] + self.fed

    @property
    def kv_bytes(self) -> int:
        """Size of its cache."""
        layers = [] if self.cache is None else self.cache.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.keys is not None)

    def _run(self, **arguments: Any) -> Any:
        with torch.no_grad(), self.quiet():
            return self.adapter.model(**arguments, return_dict=True)


def text_only_prompt(adapter: Adapter, ids: Tensor, mask: Tensor | None) -> ContrastPrompt:
    """Return prompts without their visual tokens; BOS, template and the markers around images stay.

    Args:
        adapter: of the model.
        ids: (B, S) the caller's.
        mask: (B, S), 0 on padding; None if there is none.
    """
    keep = ~adapter.is_visual(ids)
    if mask is not None:
        keep &= mask.bool()
    index, valid = compact(keep, pad="left")
    counted = torch.ones_like(index) if valid is None else valid.long()
    short = gather_rows(ids, index)
    if valid is not None:  # padding must not look like an image placeholder
        short = short.masked_fill(~valid & adapter.is_visual(short), 0)
    return ContrastPrompt(short, valid, (counted.cumsum(-1) - 1).clamp(min=0), {})


def changed_prompt(
    adapter: Adapter,
    call: Mapping[str, Any],
    mask: Tensor | None,
    copies: int,
    encodings: Mapping[str, Encoding],
    change: PixelChange,
    quiet: Callable[[], AbstractContextManager[None]],
) -> ContrastPrompt:
    """Return the caller's prompts with images whose pixels ``change`` has changed, encoded anew.

    Args:
        adapter: of the model.
        call: the caller's arguments of the prefill; each sample stands there ``copies`` times.
        mask: (B, S), 0 on padding; None if there is none.
        copies: beams of each sample.
        encodings: the calls that encoded the images.
        change: of one piece, see ``each_piece``.
        quiet: runs the tower without interventions.

    Raises:
        UsageError: images that were encoded outside the session.
    """
    ids = call["input_ids"]
    missing = [m for m, i in adapter.visual_ids.items() if m not in encodings and bool((ids == i).any())]
    if missing:
        name = missing[0]
        raise UsageError(f"a method in force changes pixels, but the {name}s were encoded before; pass {PIXELS[name]}")
    positions = call.get("position_ids")
    if positions is None:
        positions = adapter.positions(call, torch.ones_like(ids) if mask is None else mask)
    more = {k: call[k][::copies] for k in ("mm_token_type_ids", "token_type_ids") if call.get(k) is not None}
    with torch.no_grad(), quiet():
        more["mm_encoder_outputs"] = {
            name: getattr(adapter.inner, f"get_{name}_features")(
                **{
                    **encoding.arguments,
                    PIXELS[name]: each_piece(adapter, PIXELS[name], encoding.arguments, change),
                    "return_dict": True,
                }
            )
            for name, encoding in encodings.items()
        }
    valid = None if mask is None or bool(mask.all()) else mask.bool()[::copies]
    if positions.shape[-2] > 1:
        positions = positions[..., ::copies, :]
    return ContrastPrompt(ids[::copies], valid, positions, more)


def each_piece(adapter: Adapter, name: str, arguments: Mapping[str, Any], change: PixelChange) -> Tensor:
    """Return the pixels ``arguments[name]`` with every piece changed on its own, so that any batch gives the same.

    A piece is a crop (C, H, W), or, where the tower takes images cut into patches, one image (n, C, T, P, P) of n
    patches with T frames. Crops of padding (all zero) stay as they are.
    """
    values: Tensor = arguments[name]
    if adapter.packed_tower:
        grid = arguments["image_grid_thw"] if name == PIXELS["image"] else arguments["video_grid_thw"]
        vision = adapter.vision_config
        shape = (-1, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        images = values.split(grid.prod(-1).tolist())
        return torch.cat([change(image.unflatten(1, shape)).flatten(1) for image in images])
    crops = values.flatten(0, -4)
    sizes = arguments.get("image_sizes") if adapter.patch_grid is None else None
    new = crops.clone()
    for number, crop in enumerate(crops):
        if bool(crop.any()):
            height, width = crop.shape[1:] if sizes is None else (int(side) for side in sizes[number])
            new[number, :, :height, :width] = change(crop[:, :height, :width])
    return new.reshape(values.shape)


def copies_of_samples(adapter: Adapter, ids: Tensor, encodings: Mapping[str, Encoding]) -> int:
    """Return how often each sample stands in ids (B, S): beam search repeats it behind the encoding of its images."""
    for name, encoding in encodings.items():
        tokens = sum(encoding.lengths)
        if tokens:
            return max(1, int((ids == adapter.visual_ids[name]).sum()) // tokens)
    return 1
