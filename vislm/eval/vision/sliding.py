"""Logits from overlapping windows, for models of one input size and for large pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vislm.errors import UsageError


@dataclass(frozen=True)
class Windows:
    """Squares that cover a picture; the last of a row and column is moved back inside."""

    crop: int = 512
    """Side in pixels; a picture with a shorter side gets windows as long as that side."""
    stride: int = 341
    """Pixels from one to the next."""

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.crop:
            raise UsageError(f"windows of {self.crop} pixels every {self.stride}: expected 1 <= stride <= crop")

    def logits(self, forward: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """Return the mean of the windows' logits ``(B, C, H, W)`` of pictures ``(B, 3, H, W)``."""
        height, width = pixels.shape[2:]
        total = times = torch.zeros(())
        for top, bottom in self._spans(height):
            for left, right in self._spans(width):
                found = forward(pixels[:, :, top:bottom, left:right]).float()
                found = interpolate(found, (bottom - top, right - left), mode="bilinear", align_corners=False)
                if not total.ndim:
                    total = found.new_zeros(*found.shape[:2], height, width)
                    times = found.new_zeros(height, width)
                total[:, :, top:bottom, left:right] += found
                times[top:bottom, left:right] += 1
        return total / times

    def _spans(self, side: int) -> Iterator[tuple[int, int]]:
        for number in range(max(0, side - self.crop + self.stride - 1) // self.stride + 1):
            end = min(number * self.stride + self.crop, side)
            yield max(0, end - self.crop), end
