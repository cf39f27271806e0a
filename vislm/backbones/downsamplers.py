"""Downsamplers: between two stages, half the sides and another width."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vislm.attention.tokens import to_map, to_tokens
from vislm.backbones.downsamplers_patch import PatchDownsampler
from vislm.backbones.moh import OverlappingDownsampler
from vislm.backbones.sg_former import SgFormerDownsampler
from vislm.backbones.van import BatchNormDownsampler


class ConvDownsampler(nn.Module):
    """A 3x3 convolution of stride 2 without bias, then LayerNorm (NAT).

    Source: arXiv 2204.07143; SHI-Labs/Neighborhood-Attention-Transformer.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N / 4, dim_out)`` and their grid, half the sides, rounded up."""
        x = self.reduction(to_map(x, grid))
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])

    def macs(self, grid: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds of one image, and the grid behind."""
        return _macs(self.reduction.weight, grid)


class MergeDownsampler(nn.Module):
    """The four tokens of each 2x2 cell side by side, LayerNorm, one linear map; odd sides are padded with zeros.

    Source: Swin (arXiv 2103.14030) and DiNAT_s (arXiv 2209.15001).
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, dim_out, bias=False)

    def forward(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N / 4, dim_out)`` and their grid, half the sides, rounded up."""
        height, width = grid
        x = pad(x.unflatten(1, (height, width)), (0, 0, 0, width % 2, 0, height % 2))
        cells = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = torch.cat(cells, dim=-1)
        return self.reduction(self.norm(x.flatten(1, 2))), (x.shape[1], x.shape[2])

    def macs(self, grid: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds of one image, and the grid behind."""
        return _macs(self.reduction.weight, grid)


def _macs(weight: Tensor, grid: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    half = tuple(math.ceil(side / 2) for side in grid)
    return math.prod(half) * weight.numel(), half


DOWNSAMPLERS = {
    "conv": ConvDownsampler,
    "merge": MergeDownsampler,
    "overlapping": OverlappingDownsampler,
    "patch": PatchDownsampler,
    "sg_former": SgFormerDownsampler,
    "overlapping_batch": BatchNormDownsampler,
}
"""Name -> downsampler."""
