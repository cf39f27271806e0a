"""What a method knows of the prompt's keys, from the prefill on."""

from __future__ import annotations

import torch
from torch import Tensor


def follow(known: Tensor, batch: int, keys: int) -> Tensor:
    """Return what was known of a prefill's keys (b, ..., n), for a later forward, (batch, ..., keys).

    Keys that came later get False or 0. A batch that grew holds every sample several times in a row, as beams do.
    """
    if batch != known.shape[0]:
        known = known.repeat_interleave(batch // known.shape[0], 0)
    return torch.nn.functional.pad(known, (0, keys - known.shape[-1]))
