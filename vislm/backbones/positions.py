"""Absolute position embeddings on a grid, resized to any other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vislm.attention.tokens import on_grid, to_map, to_tokens


def position_table(side: int, dim: int, num_prefix: int = 0) -> nn.Parameter:
    """Return a learned table ``(1, num_prefix + side^2, dim)``: prefix tokens, then a square grid row-major."""
    table = nn.Parameter(torch.empty(1, num_prefix + side**2, dim))
    nn.init.trunc_normal_(table, std=0.02)
    return table


def positions(
    table: Tensor, grid: Sequence[int], num_prefix: int = 0, mode: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor:
    """Return the table ``(1, R + side^2, C)`` for another grid, ``(1, R + H W, C)``; prefix entries stay as they are.

    Args:
        table: of a square grid.
        grid: ``(H, W)``.
        num_prefix: R.
        mode: ``"bicubic"`` smooths where it shrinks, as timm does for plain ViTs; ``"bilinear"`` as PVT does.
    """
    side = math.isqrt(table.shape[1] - num_prefix)
    if tuple(grid) == (side, side):
        return table

    def resized(patches: Tensor) -> Tensor:
        maps = to_map(patches.float(), (side, side))
        maps = interpolate(maps, tuple(grid), mode=mode, align_corners=False, antialias=mode == "bicubic")
        return to_tokens(maps).to(table.dtype)

    return on_grid(table, num_prefix, resized)
