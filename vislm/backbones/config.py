"""What a backbone is made of, as data: the fields of the files under ``configs/backbones``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Literal

Component = Mapping[str, Any]
"""``{name: ..., option: value, ...}``; a plain name is short for ``{name: ...}``."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a :class:`HierarchicalConfig`.

    Args:
        dim: width C.
        depth: number of blocks.
        num_heads: attention heads of each block.
        blocks: options of the mixer that differ from block to block, repeated until there are ``depth`` of them; an
            entry with a ``name`` is a mixer of its own.
        ffn: options of the feed-forward branch that differ from the model's; with a ``name``, one of its own.
        layer_scale: initial factor of both branches, None = the model's.
        pos_embed: side of the square grid of a learned position table, added in front of the blocks and resized to any
            other grid; None = without.
    """

    dim: int
    depth: int
    num_heads: int
    blocks: tuple[Component, ...] = ({},)
    ffn: Component = field(default_factory=dict)
    layer_scale: float | None = None
    pos_embed: int | None = None


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig:
    """A stem, stages of (attention, feed-forward) blocks with a downsampler between them, a classifier.

    Args:
        stages: widths, depths and heads.
        stem: image to tokens; see ``vislm.backbones.stems``.
        block: how a layer puts its two branches together; see ``vislm.backbones.blocks``.
        downsample: between two stages; see ``vislm.backbones.downsamplers``.
        mixer: an attention of ``vislm.attention`` and its options.
        ffn: the blocks' second branch; see ``vislm.backbones.ffn``.
        final: between the last stage and the head; see ``vislm.backbones.finals``.
        init: ``"linear"`` draws the linear maps, truncated normal with deviation 0.02; ``"fan_out"`` the convolutions
            too, normal with variance 2 / (kernel size * channels out / groups).
        layer_scale: initial factor of both branches, None = without.
        norm_eps: of the layer norms in blocks and behind stages.
        stage_norm: a layer norm behind every stage, and not behind the last one alone.
        drop_path_rate: probability of dropping the last block's branches; rises linearly from 0.
        drop_rate: dropout in front of the classifier.
        in_chans: channels of the image.
        num_classes: classes, 0 = no classifier.
    """

    stages: tuple[StageConfig, ...]
    stem: Component
    mixer: Component
    ffn: Component
    block: Component = field(default_factory=lambda: {"name": "pre_norm"})
    downsample: Component | None = None
    final: Component = field(default_factory=lambda: {"name": "layer_norm"})
    init: Literal["linear", "fan_out"] = "linear"
    layer_scale: float | None = None
    norm_eps: float = 1e-5
    stage_norm: bool = False
    drop_path_rate: float = 0.0
    drop_rate: float = 0.0
    in_chans: int = 3
    num_classes: int = 1000


@dataclass(frozen=True, kw_only=True)
class HaloStageConfig:
    """One stage of a :class:`HaloNetConfig`.

    Args:
        dim: width of the stage's output.
        mid_dim: width of the attention's input, queries and keys (without a ``qk_ratio`` in the mixer's options).
        depth: number of blocks.
        num_heads: attention heads.
        value_dim: width of the attention's values, None = ``mid_dim``.
        stride: of the first block.
    """

    dim: int
    mid_dim: int
    depth: int
    num_heads: int = 8
    value_dim: int | None = None
    stride: int = 2


@dataclass(frozen=True, kw_only=True)
class HaloNetConfig:
    """A residual network whose bottlenecks hold halo attention.

    Args:
        stages: widths, depths and heads.
        mixer: options of :class:`vislm.attention.HaloAttention` that all blocks share.
        stem_dim: width of the 7x7 convolution in front.
        stem_pool: 3x3 maximum of stride 2 behind it.
        final_dim: width of a last 1x1 convolution, None = without.
        act: ``relu``, ``silu`` or ``gelu``.
        drop_path_rate: probability of dropping the last block's branch; rises linearly from 0.
        drop_rate: dropout in front of the classifier.
        in_chans: channels of the image.
        num_classes: classes, 0 = no classifier.
    """

    stages: tuple[HaloStageConfig, ...]
    mixer: Component
    stem_dim: int = 64
    stem_pool: bool = True
    final_dim: int | None = None
    act: Literal["relu", "silu", "gelu"] = "relu"
    drop_path_rate: float = 0.0
    drop_rate: float = 0.0
    in_chans: int = 3
    num_classes: int = 1000


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A plain vision transformer: patches with class and register tokens in front, blocks of one width, a classifier.

    Args:
        dim: width C.
        depth: number of blocks.
        num_heads: attention heads of each block.
        mixer: an attention of ``vislm.attention`` and its options. Where there are class or register tokens it must
            have the option ``num_prefix_tokens``, which is given to it.
        blocks: options of the mixer that differ from block to block, repeated until there are ``depth`` of them; an
            entry with a ``name`` is a mixer of its own.
        stem: image to tokens; see ``vislm.backbones.stems``.
        ffn: the blocks' second branch; see ``vislm.backbones.ffn``.
        pos_embed: side of the square grid of a learned position table, resized to any other grid; None = without.
        class_token: put a learned token in front.
        num_registers: further learned tokens behind the class token.
        embed_prefix: class and register tokens have entries in the position table too.
        global_pool: what the classifier reads: ``"token"``, the class token, or ``"avg"``, the patches' mean.
        layer_scale: initial factor of both branches, None = without.
        norm_eps: of the layer norms.
        drop_path_rate: probability of dropping the last block's branches; rises linearly from 0.
        drop_rate: dropout in front of the classifier.
        in_chans: channels of the image.
        num_classes: classes, 0 = no classifier.
    """

    dim: int
    depth: int
    num_heads: int
    mixer: Component = field(default_factory=lambda: {"name": "dense"})
    blocks: tuple[Component, ...] = ({},)
    stem: Component = field(default_factory=lambda: {"name": "patch", "patch_size": 16, "norm": False})
    ffn: Component = field(default_factory=lambda: {"name": "mlp"})
    pos_embed: int | None = 14
    class_token: bool = True
    num_registers: int = 0
    embed_prefix: bool = True
    global_pool: Literal["token", "avg"] = "token"
    layer_scale: float | None = None
    norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    drop_rate: float = 0.0
    in_chans: int = 3
    num_classes: int = 1000

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens."""
        return int(self.class_token) + self.num_registers

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """One stage per block, with its mixer."""
        prefix = {"num_prefix_tokens": self.num_prefix_tokens} if self.num_prefix_tokens else {}
        own = islice(cycle(self.blocks), self.depth)
        mixers = [dict(options) if "name" in options else {**self.mixer, **options} for options in own]
        return tuple(
            StageConfig(dim=self.dim, depth=1, num_heads=self.num_heads, blocks=({**mixer, **prefix},))
            for mixer in mixers
        )


BackboneConfig = HierarchicalConfig | HaloNetConfig | ViTConfig
"""Every kind of backbone."""
