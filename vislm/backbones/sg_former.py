"""SG-Former's stem and downsampler.

Source: "SG-Former: Self-guided Transformer with Evolving Token Reallocation" (arXiv 2308.12216);
https://github.com/OliverRensu/SG-Former.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vislm.attention.tokens import to_map, to_tokens
from vislm.backbones.positions import positions


class SgFormerStem(nn.Module):
    """Three 3x3 convolutions of strides 2, 1, 2, each with a norm, GELU between them; LayerNorm; position embedding.

    The embedding starts as sines and cosines of x in the first half of the channels and of y in the second, and is
    learned. On grids other than that of ``input_size`` it is resized (bilinear).

    Args:
        in_chans: channels of the image.
        dim: width C, a multiple of 4.
        input_size: side of the images that the position embedding is stored for.
    """

    reduction = 4
    first_conv = "conv.0.c"

    def __init__(self, in_chans: int, dim: int, input_size: int = 224) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            NormedConv(in_chans, dim, 3, stride=2),
            nn.GELU(),
            NormedConv(dim, dim, 3),
            nn.GELU(),
            NormedConv(dim, dim, 3, stride=2),
        )
        self.norm = nn.LayerNorm(dim)
        side = math.ceil(input_size / self.reduction)
        self.pos_embed = nn.Parameter(sinusoids((side, side), dim)[None])

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that take no weight decay."""
        return {"pos_embed"}

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N, dim)`` and their grid, a quarter of the image's sides, rounded up."""
        x = self.conv(images)
        grid = (x.shape[2], x.shape[3])
        return self.norm(to_tokens(x)) + positions(self.pos_embed, grid, mode="bilinear"), grid

    def macs(self, size: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds for an image of ``size``, and the grid."""
        half = [math.ceil(side / 2) for side in size]
        grid = tuple(math.ceil(side / 2) for side in half)
        first, second, third = (cast(NormedConv, self.conv[index]).c.weight.numel() for index in (0, 2, 4))
        return math.prod(half) * (first + second) + math.prod(grid) * third, grid


class SgFormerDownsampler(nn.Module):
    """1x1 convolution, GELU, depthwise 3x3 convolution of stride 2, GELU, 1x1 convolution, each with a norm."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.conv1 = NormedConv(dim, dim_out, 1)
        self.conv2 = NormedConv(dim_out, dim_out, 3, stride=2, groups=dim_out)
        self.conv3 = NormedConv(dim_out, dim_out, 1)
        self.act = nn.GELU()

    def forward(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N / 4, dim_out)`` and their grid, half the sides, rounded up."""
        x = self.conv3(self.act(self.conv2(self.act(self.conv1(to_map(x, grid))))))
        return to_tokens(x), (x.shape[2], x.shape[3])

    def macs(self, grid: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds of one image, and the grid behind."""
        half = tuple(math.ceil(side / 2) for side in grid)
        behind = self.conv2.c.weight.numel() + self.conv3.c.weight.numel()
        return math.prod(grid) * self.conv1.c.weight.numel() + math.prod(half) * behind, half


class NormedConv(nn.Module):
    """A convolution ``c`` without bias that keeps the size (but for its stride), and a norm ``bn`` over all of a map.

    The norm, ``GroupNorm`` of one group, has the name of the batch norm that it replaced in the official code.
    """

    def __init__(self, dim: int, dim_out: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(dim, dim_out, size, stride=stride, padding=size // 2, groups=groups, bias=False)
        self.bn = nn.GroupNorm(1, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map ``(B, dim_out, H / stride, W / stride)`` of x ``(B, dim, H, W)``."""
        return self.bn(self.c(x))


def sinusoids(grid: Sequence[int], dim: int) -> Tensor:
    """Return sines and cosines of each position, ``(H W, dim)``: ``[sin x | cos x | sin y | cos y]``.

    The frequencies are ``10000^(-i / (dim / 4))``.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (x, y)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()
