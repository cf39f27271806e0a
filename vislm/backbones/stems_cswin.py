"""CSWin's stem."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import pad

from vislm.attention.tokens import to_tokens


class CswinStem(nn.Module):
    """A 7x7 convolution of stride 4, padded by 2, then LayerNorm; images are padded with zeros to multiples of 4.

    Source: CSWin (arXiv 2107.00652); microsoft/CSWin-Transformer.
    """

    reduction = 4
    first_conv = "proj"

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=4, padding=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N, dim)`` and their grid, a quarter of the image's sides, rounded up."""
        below, right = (-side % 4 for side in images.shape[2:])
        x = self.proj(pad(images, (0, right, 0, below)))
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])

    def macs(self, size: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds for an image of ``size``, and the grid."""
        grid = tuple(math.ceil(side / 4) for side in size)
        return math.prod(grid) * self.proj.weight.numel(), grid
