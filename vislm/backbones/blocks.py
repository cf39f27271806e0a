"""Blocks of a stage: how attention and feed-forward branch are put together; ``forward(x, grid)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vislm.attention import attention_class
from vislm.backbones.backbone import DropPath
from vislm.backbones.components import Branch
from vislm.backbones.config import HierarchicalConfig, StageConfig
from vislm.backbones.ffn import FFNS
from vislm.backbones.reading import found_in, make


class PreNorm(nn.Module):
    """``x + ls1(attn(norm1 x))``, then ``x + ls2(mlp(norm2 x))``; each branch may be dropped in training."""

    attn: Branch
    mlp: Branch

    def __init__(
        self, config: HierarchicalConfig, stage: StageConfig, mixer: Mapping[str, Any], drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(stage.dim)
        self.attn = cast(Branch, make("mixer", attention_class, mixer, dim=stage.dim, num_heads=stage.num_heads))
        self.ls1 = nn.Identity() if config.layer_scale is None else LayerScale(stage.dim, config.layer_scale)
        self.norm2 = nn.LayerNorm(stage.dim)
        self.mlp = make("ffn", found_in("ffn", FFNS), config.ffn, dim=stage.dim)
        self.ls2 = nn.Identity() if config.layer_scale is None else LayerScale(stage.dim, config.layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the block's tokens ``(B, N, C)``."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), grid)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x), grid)))

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image."""
        return self.attn.macs(grid) + self.mlp.macs(grid)


class LayerScale(nn.Module):
    """Multiplies each channel by a learned ``gamma (C,)``."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``gamma * x`` for x ``(..., C)``."""
        return self.gamma * x


BLOCKS = {"pre_norm": PreNorm}
"""Name -> block."""
