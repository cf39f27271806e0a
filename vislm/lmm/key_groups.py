"""Which key of a decoder attention is what: image, text before and after it, generated, padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vislm.lmm.decoder import Segment
from vislm.lmm.state import SessionState, valid_columns
from vislm.lmm.tokens import gather_rows


@dataclass(frozen=True)
class KeyGroups:
    """The K keys of one decoder layer, for B samples. All masks are (B, K) bool; padding belongs to no group."""

    image_of: Tensor
    """(B, K) int64: number of the image that a key belongs to, -1 elsewhere."""
    token_of: Tensor
    """(B, K) int64: place in the image's full token sequence, -1 elsewhere."""
    valid: Tensor
    """Keys that are no padding."""
    prompt: int
    """Keys of the prompt; those behind are generated."""

    @cached_property
    def image(self) -> Tensor:
        """Visual keys."""
        return self.image_of >= 0

    @cached_property
    def before(self) -> Tensor:
        """Text keys before the first visual one; all text of a sample without images."""
        return self.valid & (self.image.cumsum(-1) == 0)

    @cached_property
    def after(self) -> Tensor:
        """Keys behind the last visual one, generated ones included; none in a sample without images."""
        behind = self.image.flip(-1).cumsum(-1).flip(-1) == 0
        return self.valid & behind & self.image.any(-1, keepdim=True)

    @cached_property
    def generated(self) -> Tensor:
        """Keys that were not in the prompt."""
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        return self.valid & (columns >= self.prompt)

    @cached_property
    def first(self) -> Tensor:
        """(B,) index of the first valid key (BOS)."""
        return self.valid.to(torch.int8).argmax(-1)


def key_groups(shared: SessionState, segment: Segment | None, keys: int) -> KeyGroups:
    """Return the groups of a layer's ``keys`` keys, from the columns left in it."""
    prompt = shared.prompt
    assert prompt is not None
    image_of = prompt.image_of if segment is None else segment.image_of
    token_of = prompt.token_of if segment is None else segment.token_of
    valid = torch.ones_like(image_of, dtype=torch.bool)
    given = valid_columns(shared.prompt_mask, prompt.image_of.shape[1])
    if given is not None:
        valid = given.bool().expand_as(prompt.image_of)
        valid = valid if segment is None else gather_rows(valid, segment.index)
    if segment is not None and segment.valid is not None:
        valid = valid & segment.valid
    count = image_of.shape[1]
    new = keys - count
    tail = image_of.new_full((image_of.shape[0], new), -1)
    return KeyGroups(
        torch.cat([image_of, tail], 1),
        torch.cat([token_of, tail], 1),
        torch.cat([valid, valid.new_ones(valid.shape[0], new)], 1),
        count,
    )
