"""STViT's stem and feed-forward branch.

Source: "Vision Transformer with Super Token Sampling" (arXiv 2211.11167); https://github.com/hhb072/STViT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import gelu

from vislm.attention.pointwise import Pointwise
from vislm.attention.tokens import to_map, to_tokens
from vislm.backbones.slices import by_rows


class StvitStem(nn.Module):
    """Four 3x3 convolutions of strides 2, 1, 2, 1, each with GELU and batch normalisation behind it."""

    reduction = 4
    first_conv = "proj.0"

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.proj = nn.Sequential()
        for before, behind, stride in ((in_chans, half, 2), (half, half, 1), (half, dim, 2), (dim, dim, 1)):
            self.proj.append(nn.Conv2d(before, behind, 3, stride=stride, padding=1))
            self.proj.append(nn.GELU())
            self.proj.append(nn.BatchNorm2d(behind))

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N, dim)`` and their grid, a quarter of the image's sides, rounded up."""
        x = self.proj(images)
        return to_tokens(x), (x.shape[2], x.shape[3])

    def macs(self, size: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds for an image of ``size``, and the grid."""
        total = 0
        for conv in self.proj.children():
            if isinstance(conv, nn.Conv2d):
                size = tuple(math.ceil(side / conv.stride[0]) for side in size)
                total += math.prod(size) * conv.weight.numel()
        return total, tuple(size)


class StvitMlp(nn.Module):
    """``fc2(z + DW_3(z))`` with ``z = gelu(fc1(x))``, 1x1 convolutions, a hidden width of ``int(ratio * dim)``."""

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(ratio * dim)
        self.fc1 = Pointwise(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = Pointwise(hidden, dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return ``(B, N, C)`` for the grid's tokens ``(B, N, C)``."""

        def middle(hidden: Tensor, rows: Sequence[int]) -> Tensor:
            return hidden + to_tokens(self.dwconv(to_map(hidden, rows)))

        return by_rows(x, grid, self.dwconv.out_channels, lambda part: gelu(self.fc1(part)), middle, self.fc2)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image."""
        return math.prod(grid) * sum(part.weight.numel() for part in (self.fc1, self.dwconv, self.fc2))
