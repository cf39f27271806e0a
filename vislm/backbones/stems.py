"""Stems: from an image ``(B, C, H, W)`` to tokens and their grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import pad

from vislm.attention.tokens import to_tokens
from vislm.backbones.moh import OverlappingStem
from vislm.backbones.sg_former import SgFormerStem
from vislm.backbones.stems_cswin import CswinStem
from vislm.backbones.stvit import StvitStem
from vislm.backbones.van import BatchNormStem


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with nothing in between, then LayerNorm (NAT).

    Source: arXiv 2204.07143; SHI-Labs/Neighborhood-Attention-Transformer.
    """

    reduction = 4
    first_conv = "proj.0"

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N, dim)`` and their grid, a quarter of the image's sides, rounded up."""
        x = self.proj(images)
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])

    def macs(self, size: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds for an image of ``size``, and the grid."""
        total = 0
        for conv in self.proj.children():
            size = tuple(math.ceil(side / 2) for side in size)
            total += math.prod(size) * sum(p.numel() for p in conv.parameters() if p.ndim > 1)
        return total, tuple(size)


class PatchStem(nn.Module):
    """Non-overlapping patches of an image padded with zeros to whole ones, one linear map, then perhaps LayerNorm.

    Source: Swin (arXiv 2103.14030) and DiNAT_s (arXiv 2209.15001).
    """

    first_conv = "proj"

    def __init__(self, in_chans: int, dim: int, patch_size: int = 4, norm: bool = True) -> None:
        super().__init__()
        self.reduction = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N, dim)`` and their grid, the image's sides over ``patch_size``, rounded up."""
        below, right = (-side % self.reduction for side in images.shape[2:])
        x = self.proj(pad(images, (0, right, 0, below)))
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])

    def macs(self, size: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds for an image of ``size``, and the grid."""
        grid = tuple(math.ceil(side / self.reduction) for side in size)
        return math.prod(grid) * self.proj.weight.numel(), grid


STEMS = {
    "conv": ConvStem,
    "patch": PatchStem,
    "cswin": CswinStem,
    "overlapping": OverlappingStem,
    "sg_former": SgFormerStem,
    "overlapping_batch": BatchNormStem,
    "stvit": StvitStem,
}
"""Name -> stem."""
