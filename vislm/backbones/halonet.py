"""The HaloNet skeleton: a residual network whose bottlenecks hold halo attention in place of the 3x3 convolution.

Source: HaloNet (arXiv 2103.12731), which has no official code; ``timm.models.byoanet``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from vislm.attention.halo import HaloAttention
from vislm.attention.tokens import channels_last, to_map, to_tokens
from vislm.backbones.backbone import Backbone, DropPath, Head, drop_path_rates
from vislm.backbones.checkpointing import run_block
from vislm.backbones.config import HaloNetConfig, HaloStageConfig
from vislm.backbones.reading import make

ACTS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


class HaloNet(Backbone):
    """A network of halo attention; see :class:`HaloNetConfig`. The state dict has timm's names."""

    def __init__(self, config: HaloNetConfig) -> None:
        strides = [2 * (2 if config.stem_pool else 1), *(stage.stride for stage in config.stages)]
        reductions = [math.prod(strides[: index + 2]) for index in range(len(config.stages))]
        super().__init__(config, config.final_dim or config.stages[-1].dim, reductions)
        self.stem = nn.Sequential()
        self.stem.add_module("conv1", ConvNorm(config.in_chans, config.stem_dim, 7, 2, ACTS[config.act]()))
        if config.stem_pool:
            self.stem.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
        rates = iter(drop_path_rates(config.drop_path_rate, sum(stage.depth for stage in config.stages)))
        width = config.stem_dim
        self.stages = nn.ModuleList()
        for stage in config.stages:
            blocks = nn.Sequential()
            for index in range(stage.depth):
                stride = 1 if index else stage.stride
                blocks.append(HaloBottleneck(config, stage, width, stride, next(rates)))
                width = stage.dim
            self.stages.append(blocks)
        self.final_conv = nn.Identity()
        if config.final_dim is not None:
            self.final_conv = ConvNorm(width, config.final_dim, 1, 1, ACTS[config.act]())
        self.head = Head(self.num_features, config.num_classes, config.drop_rate)

    def stage_maps(self, images: Tensor) -> Iterator[Tensor]:
        """Yield each stage's output ``(B, C_i, H_i, W_i)`` for images ``(B, 3, H, W)`` of any size."""
        x = self.stem(channels_last(images))
        for stage in self.stages:
            for block in stage.children():
                x = run_block(block, x, recompute=self.grad_checkpointing)
            yield x

    def finish(self, features: Tensor) -> Tensor:
        """Return the tokens ``(B, N, C)`` of the last stage's map, behind the final convolution."""
        return to_tokens(self.final_conv(features))

    def macs(self, input_size: Sequence[int] = (224, 224)) -> int:
        """Return the multiply-adds for one image: convolutions and the products of attention."""
        grid = tuple(math.ceil(side / 2) for side in input_size)
        total = _weights(self.stem) * math.prod(grid)
        if len(self.stem) > 1:
            grid = tuple(math.ceil(side / 2) for side in grid)
        for stage in self.stages:
            for block in stage.children():
                assert isinstance(block, HaloBottleneck)
                cost, grid = block.macs(grid)
                total += cost
        return total + _weights(self.final_conv) * math.prod(grid) + self.num_features * self.num_classes


class HaloBottleneck(nn.Module):
    """1x1 convolution, halo attention, 1x1 convolution, around a shortcut; the attention does the downsampling."""

    def __init__(self, config: HaloNetConfig, stage: HaloStageConfig, dim: int, stride: int, drop_path: float) -> None:
        super().__init__()
        value_dim = stage.mid_dim if stage.value_dim is None else stage.value_dim
        self.conv1_1x1 = ConvNorm(dim, stage.mid_dim, 1, 1, ACTS[config.act]())
        self.self_attn = make(
            "mixer",
            lambda _: HaloAttention,
            {"name": "halo", "qk_ratio": stage.mid_dim / value_dim, **config.mixer},
            dim=stage.mid_dim,
            dim_out=value_dim,
            num_heads=stage.num_heads,
            stride=stride,
        )
        self.post_attn = nn.BatchNorm2d(value_dim)
        self.conv3_1x1 = ConvNorm(value_dim, stage.dim, 1, 1)
        same = stride == 1 and dim == stage.dim
        self.shortcut = nn.Identity() if same else ConvNorm(dim, stage.dim, 1, stride)
        self.act = ACTS[config.act]()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's map ``(B, C_out, H', W')`` for x ``(B, C, H, W)``."""
        shortcut, x = self.shortcut(x), self.conv1_1x1(x)
        height, width = out_grid = self.self_attn.out_grid(x.shape[2:])
        x = to_map(self.self_attn(to_tokens(x), x.shape[2:]), out_grid)
        x = self.conv3_1x1(self.act(self.post_attn(x)))
        # A pooled map of odd size is one smaller than the strided shortcut.
        return self.act(self.drop_path(x) + shortcut[:, :, :height, :width])

    def macs(self, grid: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds of one image, and the grid behind."""
        out_grid = self.self_attn.out_grid(grid)
        behind = _weights(self.conv3_1x1) + _weights(self.shortcut)
        before = math.prod(grid) * _weights(self.conv1_1x1)
        return before + self.self_attn.macs(grid) + math.prod(out_grid) * behind, out_grid


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalisation, and an activation if one is given."""

    def __init__(self, dim: int, dim_out: int, size: int, stride: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, size, stride=stride, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(dim_out)
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        """Return the map ``(B, dim_out, H / stride, W / stride)``, sides rounded up."""
        return self.act(self.bn(self.conv(x)))


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 4)
