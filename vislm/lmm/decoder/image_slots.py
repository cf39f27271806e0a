"""One place for every image token of a sample, the same in layers that hold different keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.lmm.decoder.key_groups import KeyGroups


@dataclass(frozen=True)
class ImageSlots:
    """Slots of B samples: token t of a sample's i-th image has slot i * tokens + t."""

    tokens: int
    """Slots of each image."""
    valid: Tensor
    """(B, V) bool: slots whose token was there when the slots were made."""
    first: Tensor
    """(B,) number of each sample's first image."""

    @classmethod
    def of(cls, keys: KeyGroups) -> ImageSlots:
        """Return the slots for all images of these keys, those of a layer that has lost none."""
        first = _first_image(keys)
        tokens = int(keys.token_of.max()) + 1
        images = int((keys.image_of - first[:, None]).max()) + 1
        empty = torch.zeros(len(first), max(1, images) * tokens, dtype=torch.bool, device=first.device)
        slots = cls(tokens, empty, first)
        valid = slots.put(torch.ones(keys.image_of.shape, device=first.device), keys) > 0
        return cls(tokens, valid, first)

    def renumbered(self, keys: KeyGroups) -> ImageSlots:
        """Return the same slots for another run of the prompts, whose images have the numbers in ``keys``."""
        return ImageSlots(self.tokens, self.valid, _first_image(keys))

    def of_keys(self, keys: KeyGroups) -> Tensor:
        """Return (B, K) int64: the slot of each key, -1 for keys without one."""
        slot = (keys.image_of - self.first[:, None]) * self.tokens + keys.token_of
        known = keys.image & (keys.token_of < self.tokens) & (slot < self.valid.shape[1])
        return torch.where(known, slot, -1)

    def put(self, values: Tensor, keys: KeyGroups) -> Tensor:
        """Return (B, V): values (B, K) of the keys in their slots, 0 in the others."""
        slot = self.of_keys(keys)
        empty = torch.zeros(len(values), self.valid.shape[1], dtype=values.dtype, device=values.device)
        return empty.scatter_add(1, slot.clamp(min=0), torch.where(slot >= 0, values, 0.0))

    def take(self, values: Tensor, keys: KeyGroups) -> Tensor:
        """Return (B, K): for each key the value (B, V) of its slot, 0 for keys without one."""
        slot = self.of_keys(keys)
        return torch.where(slot >= 0, values.gather(1, slot.clamp(min=0)), 0.0)


def _first_image(keys: KeyGroups) -> Tensor:
    """Return (B,) the lowest image number of each sample; of one without images a number beyond all."""
    beyond = int(keys.image_of.max()) + 1
    return torch.where(keys.image, keys.image_of, beyond).amin(-1)
