"""PVT's downsampler: patches of 2x2 tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from vislm.attention.tokens import pad_grid, to_map, to_tokens


class PatchDownsampler(nn.Module):
    """A 2x2 convolution of stride 2, then LayerNorm; odd sides are padded with zeros.

    Source: PVT (arXiv 2102.12122); whai362/PVT.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 2, stride=2)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N / 4, dim_out)`` and their grid, half the sides, rounded up."""
        even = [side + side % 2 for side in grid]
        x = self.proj(to_map(pad_grid(x, grid, even), even))
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])

    def macs(self, grid: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds of one image, and the grid behind."""
        half = tuple(math.ceil(side / 2) for side in grid)
        return math.prod(half) * self.proj.weight.numel(), half
