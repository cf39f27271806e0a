"""The hierarchical skeleton: stem, stages of blocks with a downsampler in front, head. Everything else is a component.

A plain ViT with mean pooling is the case of one stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import cast

from torch import Tensor, nn

from vislm.attention.tokens import channels_last, to_map, to_tokens
from vislm.backbones.backbone import Backbone, Head, drop_path_rates, initialize, initialize_convolutions
from vislm.backbones.blocks import BLOCKS
from vislm.backbones.checkpointing import run_block
from vislm.backbones.components import Block, Downsampler, Final, Stem
from vislm.backbones.config import HierarchicalConfig, StageConfig
from vislm.backbones.downsamplers import DOWNSAMPLERS
from vislm.backbones.finals import FINALS
from vislm.backbones.positions import position_table, positions
from vislm.backbones.reading import found_in, make
from vislm.backbones.stems import STEMS
from vislm.errors import UsageError


class Hierarchical(Backbone):
    """A hierarchical vision transformer; see :class:`HierarchicalConfig`.

    The state dict has timm's habits: ``stem, stages.i.downsample, stages.i.blocks.j.{norm1, attn, ls1, norm2, mlp,
    ls2}, stages.i.norm (with ``stage_norm``), norm, head.fc``.
    """

    stem: Stem
    norm: Final

    def __init__(self, config: HierarchicalConfig) -> None:
        stem = make("stem", found_in("stem", STEMS), config.stem, in_chans=config.in_chans, dim=config.stages[0].dim)
        reductions = [stem.reduction * 2**index for index in range(len(config.stages))]
        final = make("final", found_in("final", FINALS), config.final, config=config)
        super().__init__(config, final.num_features, reductions)
        if len(config.stages) > 1 and config.downsample is None:
            raise UsageError(f"{len(config.stages)} stages need a downsample between them; give its name")
        self.stem = stem
        rates = drop_path_rates(config.drop_path_rate, sum(stage.depth for stage in config.stages))
        self.stages = nn.ModuleList()
        for index, stage in enumerate(config.stages):
            before = config.stages[index - 1].dim if index else None
            self.stages.append(Stage(config, stage, before, rates[: stage.depth]))
            if config.stage_norm and index < len(config.stages) - 1:
                self.stages[index].norm = nn.LayerNorm(stage.dim, config.norm_eps)
            rates = rates[stage.depth :]
        self.norm = final
        self.head = Head(self.num_features, config.num_classes, config.drop_rate)
        initialize(self)
        if config.init == "fan_out":
            initialize_convolutions(self)

    def stage_maps(self, images: Tensor) -> Iterator[Tensor]:
        """Yield each stage's output ``(B, C_i, H_i, W_i)`` for images ``(B, 3, H, W)`` of any size."""
        x, grid = self.stem(channels_last(images))
        for stage in self.stages:
            x, grid = stage(x, grid)
            yield to_map(x, grid)

    def finish(self, features: Tensor) -> Tensor:
        """Return the normalised tokens ``(B, N, C)`` of the last stage's map."""
        return self.norm(to_tokens(features))

    def macs(self, input_size: Sequence[int] = (224, 224)) -> int:
        """Return the multiply-adds for one image: convolutions, linear maps and the products of attention."""
        total, grid = self.stem.macs(input_size)
        for stage in self.stages:
            cost, grid = cast(Stage, stage).macs(grid)
            total += cost
        return total + self.norm.macs(grid) + self.num_features * self.num_classes


class Stage(nn.Module):
    """A downsampler (but for the first stage), blocks of one width, and perhaps a norm."""

    downsample: Downsampler | None
    norm: nn.Module | None
    pos_embed: nn.Parameter | None
    grad_checkpointing = False

    def __init__(
        self, config: HierarchicalConfig, stage: StageConfig, dim_before: int | None, rates: Sequence[float]
    ) -> None:
        super().__init__()
        self.downsample = self.norm = self.pos_embed = None
        if dim_before is not None and config.downsample is not None:
            find = found_in("downsample", DOWNSAMPLERS)
            self.downsample = make("downsample", find, config.downsample, dim=dim_before, dim_out=stage.dim)
        if stage.pos_embed is not None:
            self.pos_embed = position_table(stage.pos_embed, stage.dim)
        own = islice(cycle(stage.blocks), stage.depth)
        mixers = [dict(options) if "name" in options else {**config.mixer, **options} for options in own]
        find = found_in("block", BLOCKS)
        self.blocks = nn.ModuleList(
            make("block", find, config.block, config=config, stage=stage, mixer=mixer, drop_path=rate)
            for mixer, rate in zip(mixers, rates, strict=True)
        )

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that take no weight decay."""
        return {"pos_embed"}

    def forward(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        """Return the stage's tokens ``(B, N, C)`` and their grid."""
        if self.downsample is not None:
            x, grid = self.downsample(x, grid)
        if self.pos_embed is not None:
            x = x + positions(self.pos_embed, grid, mode="bilinear")
        passed = None
        for block in self.blocks:
            if getattr(block, "relays", False):
                x, passed = run_block(block, x, grid, passed, recompute=self.grad_checkpointing)
            else:
                x = run_block(block, x, grid, recompute=self.grad_checkpointing)
        return x if self.norm is None else self.norm(x), grid

    def macs(self, grid: Sequence[int]) -> tuple[int, Sequence[int]]:
        """Return the multiply-adds of one image, and the stage's grid."""
        total = 0
        if self.downsample is not None:
            total, grid = self.downsample.macs(grid)
        return total + sum(cast(Block, block).macs(grid) for block in self.blocks), grid
