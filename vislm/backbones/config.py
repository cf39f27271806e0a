"""What a backbone is made of, as data: the fields of the files under ``configs/backbones``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """

    dim: int
    depth: int
    num_heads: int
    blocks: tuple[Component, ...] = ({},)


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
        layer_scale: initial factor of both branches, None = without.
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
    layer_scale: float | None = None
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


BackboneConfig = HierarchicalConfig | HaloNetConfig
"""Every kind of backbone."""
