"""Blocks of a stage: how attention and feed-forward branch are put together; ``forward(x, grid)``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from vislm.attention import attention_class
from vislm.attention.hybrid_scale import HybridScaleAttention
from vislm.attention.layer_scale import LayerScale
from vislm.attention.self_guided import SelfGuidedAttention
from vislm.attention.tokens import to_map, to_tokens
from vislm.backbones.backbone import DropPath
from vislm.backbones.components import Branch
from vislm.backbones.config import HierarchicalConfig, StageConfig, ViTConfig
from vislm.backbones.ffn import FFNS
from vislm.backbones.norms import NORMS
from vislm.backbones.reading import found_in, make


class PreNorm(nn.Module):
    """``x + ls1(attn(norm1 x))``, then ``x + ls2(mlp(norm2 x))``; each branch may be dropped in training.

    Args:
        config: the backbone: feed-forward branch, layer scale, ``norm_eps``.
        stage: width, heads, and what differs from the backbone.
        mixer: the attention.
        drop_path: probability of dropping a branch.
        norm1: name of the normalisation in front of the attention; see ``vislm.backbones.norms``.
        norm2: the one in front of the feed-forward branch.
    """

    attn: Branch
    mlp: Branch

    def __init__(
        self,
        config: HierarchicalConfig | ViTConfig,
        stage: StageConfig,
        mixer: Mapping[str, Any],
        drop_path: float,
        norm1: str = "layer",
        norm2: str = "layer",
    ) -> None:
        super().__init__()
        scale = config.layer_scale if stage.layer_scale is None else stage.layer_scale
        ffn = stage.ffn if "name" in stage.ffn else {**config.ffn, **stage.ffn}
        self.norm1 = found_in("norm1", NORMS)(norm1)(stage.dim, config.norm_eps)
        self.attn = cast(Branch, make("mixer", attention_class, mixer, dim=stage.dim, num_heads=stage.num_heads))
        self.ls1 = nn.Identity() if scale is None else LayerScale(stage.dim, scale)
        self.norm2 = found_in("norm2", NORMS)(norm2)(stage.dim, config.norm_eps)
        self.mlp = make("ffn", found_in("ffn", FFNS), ffn, dim=stage.dim)
        self.ls2 = nn.Identity() if scale is None else LayerScale(stage.dim, scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the block's tokens ``(B, N, C)``."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), grid)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x), grid)))

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image."""
        return self.attn.macs(grid) + self.mlp.macs(grid)


class SelfGuided(PreNorm):
    """A pre-norm block that hands on the significance map of hybrid-scale attention to the next, self-guided one.

    Other attentions pass the map by; a map that no self-guided block uses ends with the stage.
    """

    relays = True

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - Stage calls relaying blocks so
        self, x: Tensor, grid: Sequence[int], significance: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the block's tokens ``(B, N, C)``, and the map ``(B, N)`` for the next block or None."""
        attention, normed = self.attn, self.norm1(x)
        if isinstance(attention, HybridScaleAttention):
            mixed, significance = attention(normed, grid, significance=True)
        elif isinstance(attention, SelfGuidedAttention):
            mixed, significance = attention(normed, grid, significance), None
        else:
            mixed = attention(normed, grid)
        x = x + self.drop_path(self.ls1(mixed))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x), grid))), significance


class ConvPosition(PreNorm):
    """A pre-norm block behind ``x + DW_3(x)``, a position encoding that depends on the content (STViT).

    Source: CPVT (arXiv 2102.10882), STViT (arXiv 2211.11167).
    """

    def __init__(
        self,
        config: HierarchicalConfig,
        stage: StageConfig,
        mixer: Mapping[str, Any],
        drop_path: float,
        norm1: str = "layer",
        norm2: str = "layer",
    ) -> None:
        super().__init__(config, stage, mixer, drop_path, norm1, norm2)
        self.pos_embed = nn.Conv2d(stage.dim, stage.dim, 3, padding=1, groups=stage.dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the block's tokens ``(B, N, C)``."""
        return super().forward(x + to_tokens(self.pos_embed(to_map(x, grid))), grid)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image."""
        return super().macs(grid) + math.prod(grid) * self.pos_embed.weight.numel()


BLOCKS = {
    "pre_norm": PreNorm,
    "conv_position": ConvPosition,
    "self_guided": SelfGuided,
}
"""Name -> block."""
