"""MoH-ViT's stem and downsampler: overlapping patches.

Source: TransNeXt (arXiv 2311.17132), MoH (arXiv 2410.11842); https://github.com/SkyworkAI/MoH.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from vislm.attention.tokens import to_map, to_tokens


class OverlappingStem(nn.Module):
    """A 7x7 convolution of stride 4, then LayerNorm."""

    reduction = 4
    first_conv = "proj"

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N, dim)`` and their grid, a quarter of the image's sides, rounded up."""
        x = self.proj(images)
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])

    def macs(self, size: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds for an image of ``size``, and the grid."""
        grid = tuple(math.ceil(side / 4) for side in size)
        return math.prod(grid) * self.proj.weight.numel(), grid


class OverlappingDownsampler(nn.Module):
    """A 3x3 convolution of stride 2, then LayerNorm."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N / 4, dim_out)`` and their grid, half the sides, rounded up."""
        x = self.proj(to_map(x, grid))
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])

    def macs(self, grid: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds of one image, and the grid behind."""
        half = tuple(math.ceil(side / 2) for side in grid)
        return math.prod(half) * self.proj.weight.numel(), half
