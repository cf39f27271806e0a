"""The plain skeleton: patches, class and register tokens, positions, blocks of one width. Any attention fits in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vislm.attention.tokens import to_map
from vislm.backbones.backbone import FORMATS, Backbone, Head, drop_path_rates, initialize
from vislm.backbones.blocks import PreNorm
from vislm.backbones.checkpointing import run_block
from vislm.backbones.components import Stem
from vislm.backbones.config import ViTConfig
from vislm.backbones.positions import position_table, positions
from vislm.backbones.reading import found_in, make
from vislm.backbones.stems import STEMS
from vislm.errors import UnknownName, UsageError

POOLS = ("token", "avg")


class ViT(Backbone):
    """A plain vision transformer; see :class:`ViTConfig`. Images of any size; positions are resized to their grid.

    The state dict has timm's names, but for ``stem`` and ``head.fc``: ``stem.proj, cls_token, reg_token, pos_embed,
    blocks.i.{norm1, attn, ls1, norm2, mlp, ls2}, norm, head.fc``. Its levels are its blocks, as in timm.

    Source: ViT (arXiv 2010.11929), DeiT (2012.12877), registers (2309.16588); ``timm.models.vision_transformer``.
    """

    stem: Stem

    def __init__(self, config: ViTConfig) -> None:
        stem = make("stem", found_in("stem", STEMS), config.stem, in_chans=config.in_chans, dim=config.dim)
        super().__init__(config, config.dim, [stem.reduction] * config.depth)
        for index, info in enumerate(self.feature_info):
            info["module"] = f"blocks.{index}"
        if config.global_pool == "token" and not config.class_token:
            raise UsageError('global_pool="token" reads the class token; give class_token=True or global_pool="avg"')
        self.stem, self.global_pool = stem, config.global_pool
        self.num_prefix_tokens = config.num_prefix_tokens
        self.embedded_prefix = self.num_prefix_tokens if config.embed_prefix else 0
        self.cls_token = _tokens(int(config.class_token), config.dim)
        self.reg_token = _tokens(config.num_registers, config.dim)
        self.pos_embed = None
        if config.pos_embed is not None:
            self.pos_embed = position_table(config.pos_embed, config.dim, self.embedded_prefix)
        rates = drop_path_rates(config.drop_path_rate, config.depth)
        self.blocks = nn.ModuleList(
            PreNorm(config, stage, stage.blocks[0], rate) for stage, rate in zip(config.stages, rates, strict=True)
        )
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.head = Head(self.num_features, config.num_classes, config.drop_rate)
        initialize(self)

    @property
    def levels(self) -> nn.ModuleList:
        """The blocks."""
        return self.blocks

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that take no weight decay, beside biases and norms."""
        own = {"cls_token", "reg_token", "pos_embed"} & {name for name, _ in self.named_parameters()}
        return super().no_weight_decay() | own

    def embedded(self, images: Tensor) -> tuple[Tensor, Sequence[int]]:
        """Return the tokens in front of the first block, ``(B, R + N, C)``, and the patches' grid."""
        x, grid = self.stem(images)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat((*prefix, x), dim=1)
        if self.pos_embed is None:
            return x, grid
        table = positions(self.pos_embed, grid, self.embedded_prefix)
        bare = x.shape[1] - table.shape[1]
        return torch.cat((x[:, :bare], x[:, bare:] + table), dim=1), grid

    def block_outputs(self, images: Tensor) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """Yield each block's tokens ``(B, R + N, C)`` and the patches' grid for images ``(B, 3, H, W)``."""
        x, grid = self.embedded(images)
        for block in self.blocks:
            x = run_block(block, x, grid, recompute=self.grad_checkpointing)
            yield x, grid

    def stage_maps(self, images: Tensor) -> Iterator[Tensor]:
        """Yield each block's patches ``(B, C, H, W)`` for images ``(B, 3, H, W)``."""
        for x, grid in self.block_outputs(images):
            yield to_map(x[:, self.num_prefix_tokens :], grid)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the normalised tokens ``(B, R + N, C)``, class and register tokens first."""
        x, _ = deque(self.block_outputs(images), maxlen=1).pop()  # no other block's output stays in memory
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits ``(B, classes)`` of the tokens ``(B, R + N, C)``, or with ``pre_logits`` what they come from:
        the class token ``(B, C)``, or the patches' mean."""
        read = x[:, :1] if self.global_pool == "token" else x[:, self.num_prefix_tokens :]
        return self.head(read, pre_logits)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Return the blocks' outputs, in front of them (unless ``intermediates_only``) the tokens for the head.

        Args:
            images: ``(B, 3, H, W)``.
            indices: which blocks, negative from the end; a number = the last so many; None = all.
            norm: normalise each output as the last one.
            stop_early: compute no block behind the last one wanted; only with ``intermediates_only``.
            output_fmt: ``"NCHW"`` or ``"NLC"``, of the patches.
            intermediates_only: return the list alone.
            return_prefix_tokens: pairs of patches and prefix tokens ``(B, R, C)``, if there are any.
        """
        if output_fmt not in FORMATS:
            raise UnknownName("output_fmt", output_fmt, FORMATS)
        wanted = self._level_indices(indices)
        chosen, prefixes, last = dict[int, Tensor](), dict[int, Tensor](), torch.empty(0)
        for index, (x, grid) in enumerate(self.block_outputs(images)):
            last = x
            if index in wanted:
                x = self.norm(x) if norm else x
                prefixes[index], patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
                chosen[index] = to_map(patches, grid) if output_fmt == "NCHW" else patches
            if intermediates_only and stop_early and index == max(wanted):
                break
        outputs: list[Any] = [chosen[index] for index in wanted]
        if return_prefix_tokens and self.num_prefix_tokens:
            outputs = list(zip(outputs, (prefixes[index] for index in wanted), strict=True))
        return outputs if intermediates_only else (self.norm(last), outputs)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place; ``global_pool``: ``"token"``, ``"avg"`` or None = as before."""
        if global_pool is not None:
            if global_pool not in POOLS or (global_pool == "token" and self.cls_token is None):
                raise UsageError(f"{global_pool=}, expected 'avg', or 'token' for a model with a class token")
            self.global_pool = global_pool
        super().reset_classifier(num_classes)

    def macs(self, input_size: Sequence[int] = (224, 224)) -> int:
        """Return the multiply-adds for one image: convolutions, linear maps and the products of attention."""
        total, grid = self.stem.macs(input_size)
        for block in self.blocks:
            # A branch counts the grid's tokens; the feed-forward one treats prefix tokens alike.
            total += cast(PreNorm, block).macs(grid) + cast(PreNorm, block).mlp.macs((self.num_prefix_tokens, 1))
        return total + self.num_features * self.num_classes


def _tokens(count: int, dim: int) -> nn.Parameter | None:
    if count == 0:
        return None
    tokens = nn.Parameter(torch.empty(1, count, dim))
    nn.init.trunc_normal_(tokens, std=0.02)
    return tokens
