"""Which key of a decoder attention is what: image, text before and after it, generated, padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from vislm.lmm.choosing.tokens import gather_rows
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.decoder.pruning import Segment
from vislm.lmm.state import PromptMap, SessionState, valid_columns


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
    extends: KeyGroups | None = None
    """The prompt's own groups, where these are they and generated keys."""

    @property
    def count(self) -> int:
        """K."""
        return self.image_of.shape[1]

    @cached_property
    def image(self) -> Tensor:
        """Visual keys."""
        return self.image_of >= 0 if self.extends is None else self._longer(self.extends.image, None)

    @cached_property
    def before(self) -> Tensor:
        """Text keys before the first visual one; all text of a sample without images."""
        if self.extends is not None:
            return self._longer(self.extends.before, ~self.extends._some)
        return self.valid & (self.image.cumsum(-1) == 0)

    @cached_property
    def after(self) -> Tensor:
        """Keys behind the last visual one, generated ones included; none in a sample without images."""
        if self.extends is not None:
            return self._longer(self.extends.after, self.extends._some)
        behind = self.image.flip(-1).cumsum(-1).flip(-1) == 0
        return self.valid & behind & self._some

    @cached_property
    def generated(self) -> Tensor:
        """Keys that were not in the prompt."""
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        return self.valid & (columns >= self.prompt)

    @cached_property
    def first(self) -> Tensor:
        """(B,) index of the first valid key (BOS)."""
        return self.valid.to(torch.int8).argmax(-1) if self.extends is None else self.extends.first

    @cached_property
    def _some(self) -> Tensor:
        """(B, 1) bool: samples with an image."""
        return self.image.any(-1, keepdim=True)

    def factors(self, image: float, before: float, other: float) -> Tensor:
        """Return one number per key (B, 1, 1, K) float32: on visual keys, on the text before them, on all others."""
        wanted = (image, before, other)
        if wanted not in self._factors:
            chosen = torch.where(self.image, image, torch.where(self.before, before, other))
            self._factors[wanted] = chosen[:, None, None]
        return self._factors[wanted]

    @cached_property
    def _factors(self) -> dict[tuple[float, float, float], Tensor]:
        return {}

    def extended(self, keys: int) -> KeyGroups:
        """Return the groups of so many keys, those behind the prompt's being generated ones."""
        new = keys - self.count
        if not new:
            return self
        tail = self.image_of.new_full((self.image_of.shape[0], new), -1)
        return KeyGroups(
            torch.cat([self.image_of, tail], 1),
            torch.cat([self.token_of, tail], 1),
            torch.cat([self.valid, self.valid.new_ones(len(self.valid), new)], 1),
            self.prompt,
            self,
        )

    def _longer(self, mask: Tensor, rest: Tensor | None) -> Tensor:
        """Return a mask (B, n) of the prompt's keys and, for those behind, ``rest`` (B, 1), None: False."""
        shape = (len(mask), self.count - mask.shape[1])
        return torch.cat([mask, mask.new_zeros(shape) if rest is None else rest.expand(shape)], 1)


def key_groups(shared: SessionState, segment: Segment | None) -> KeyGroups:
    """Return the groups of the prompt's keys in a layer, from the columns left in it."""
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
    return KeyGroups(image_of, token_of, valid, image_of.shape[1])


@dataclass
class KnownKeys:
    """What is the same in all decoder layers that hold the same keys, in one forward."""

    segment: Segment | None
    prompt: PromptMap | None
    groups: KeyGroups
    _seen: tuple[Tensor | None, Tensor] | None = None

    def allowed(self, call: AttentionCall) -> Tensor:
        """Return the keys (B or 1, 1, 1, K) that the one row of a decode step may attend to."""
        if self._seen is None or self._seen[0] is not call.mask:
            self._seen = (call.mask, call.allowed(first_row(call.query.device)))
        return self._seen[1]


class KeysInTurn:
    """Remembers the keys of the last layer that asked, and of the prompt, as the next one mostly holds the same."""

    def __init__(self, shared: SessionState) -> None:
        self.shared = shared
        self._known: KnownKeys | None = None
        self._prompt: KnownKeys | None = None

    def of(self, segment: Segment | None, keys: int) -> KnownKeys:
        """Return what is known of the ``keys`` keys of a layer."""
        prompt, known = self.shared.prompt, self._known
        if known is None or known.segment is not segment or known.prompt is not prompt or known.groups.count != keys:
            start = self._prompt
            if start is None or start.segment is not segment or start.prompt is not prompt:
                start = self._prompt = KnownKeys(segment, prompt, key_groups(self.shared, segment))
            known = self._known = KnownKeys(segment, prompt, start.groups.extended(keys))
        return known


@lru_cache(maxsize=8)
def first_row(device: torch.device) -> Tensor:
    """Return the index (1,) of the only row."""
    with torch.inference_mode(False):  # or it could not be used outside of that mode later
        return torch.zeros(1, dtype=torch.int64, device=device)
