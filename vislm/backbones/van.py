"""VAN's stem, downsampler (STViT's too) and feed-forward branch.

Source: "Visual Attention Network" (arXiv 2202.09741); https://github.com/Visual-Attention-Network/VAN-Classification.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import gelu

from vislm.attention.pointwise import Pointwise
from vislm.attention.tokens import to_map, to_tokens
from vislm.backbones.moh import OverlappingDownsampler, OverlappingStem
from vislm.backbones.norms import BatchNorm
from vislm.backbones.slices import by_rows


class BatchNormStem(OverlappingStem):
    """A 7x7 convolution of stride 4, then batch normalisation."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(in_chans, dim)
        self.norm = BatchNorm(dim)


class BatchNormDownsampler(OverlappingDownsampler):
    """A 3x3 convolution of stride 2, then batch normalisation."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(dim, dim_out)
        self.norm = BatchNorm(dim_out)


class ConvMlp(nn.Module):
    """``fc2(gelu(DW_3(fc1(x))))`` of 1x1 convolutions, with a hidden width of ``int(ratio * dim)``."""

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(ratio * dim)
        self.fc1 = Pointwise(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = Pointwise(hidden, dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return ``(B, N, C)`` for the grid's tokens ``(B, N, C)``."""

        def middle(hidden: Tensor, rows: Sequence[int]) -> Tensor:
            return gelu(to_tokens(self.dwconv(to_map(hidden, rows))))

        return by_rows(x, grid, self.dwconv.out_channels, self.fc1, middle, self.fc2)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image."""
        return math.prod(grid) * sum(part.weight.numel() for part in (self.fc1, self.dwconv, self.fc2))
