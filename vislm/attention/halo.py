"""Halo attention: the queries of a block share the keys of the block and of a halo around it.

Source: HaloNet (arXiv 2103.12731), which has no official code; ``timm.layers.halo_attn``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, linear

from vislm.attention.tokens import (
    check_heads,
    check_tokens,
    crop_grid,
    merge_heads,
    on_grid,
    pad_grid,
    split_heads,
    to_map,
    to_tokens,
)
from vislm.errors import UsageError
from vislm.kernels import Blocked, DecoupledBias, attend


class HaloAttention(nn.Module):
    """Multi-head attention of blocks to haloed windows, with relative position logits of the query's content.

    ``softmax(scale q k^T + q Eh[row offset] + q Ew[column offset]) v``, without an output projection. A map that is no
    multiple of the block is padded with zero tokens, which are hidden. What lies outside of the map is not hidden
    otherwise: it takes its share of the softmax with zero keys and values, as in timm; see ``mask_padding``.

    Args:
        dim: width C.
        dim_out: width of the output, None = ``dim``.
        stride: 2 halves each side of the map: with ``avg_down`` or an odd block by averaging the output, otherwise by
            leaving out queries, so that row and column offsets count queries on one side and keys on the other.
        num_heads: H, divides ``dim_out``.
        dim_head: width of a head's queries and keys, None = from ``dim_out * qk_ratio``.
        block_size: b, tokens along each side of a block.
        halo_size: h, tokens around the block; windows are ``w = b + 2 h`` wide.
        qk_ratio: width of queries and keys as a part of ``dim_out``.
        qkv_bias: biases of the projections.
        avg_down: see ``stride``.
        scale_pos_embed: multiply the position term by the scale too.
        mask_padding: hide what lies outside of the map.
        num_prefix_tokens: class and register tokens in front: seen by every token, seeing every token.

    The state dict has timm's names: ``q, kv, pos_embed.height_rel, pos_embed.width_rel``; the projections are 1x1
    convolutions.

    Raises:
        UsageError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        mask_padding: bool = False,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise UsageError(f"{stride=}, expected 1 or 2")
        if block_size < 1 or halo_size < 0:
            raise UsageError(f"{block_size=}, {halo_size=}, expected at least 1 and 0")
        self.dim, self.dim_out, self.num_heads = dim, dim if dim_out is None else dim_out, num_heads
        self.dim_value = check_heads(self.dim_out, num_heads)
        self.dim_head = dim_head or rounded(self.dim_out * qk_ratio) // num_heads
        self.stride, self.block_size, self.halo_size = stride, block_size, halo_size
        self.pools = stride == 2 and (avg_down or block_size % 2 == 1)
        self.query_stride = 1 if self.pools else stride
        self.scale_pos_embed, self.mask_padding = scale_pos_embed, mask_padding
        self.num_prefix_tokens = num_prefix_tokens
        self.q = nn.Conv2d(dim, num_heads * self.dim_head, 1, stride=self.query_stride, bias=qkv_bias)
        self.kv = nn.Conv2d(dim, num_heads * (self.dim_head + self.dim_value), 1, bias=qkv_bias)
        self.pos_embed = RelativePosition(block_size + 2 * halo_size, self.dim_head)
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=dim**-0.5)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the output ``(B, N', C_out)``: prefix tokens, then the tokens of :meth:`out_grid`.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            grid: ``(H, W)``.
        """
        grid = check_tokens(x, grid, self.dim, self.num_prefix_tokens, 2)
        pattern, prefix = self.pattern(grid), self.num_prefix_tokens
        query, key, value, options = self.operands(x, grid)
        x = merge_heads(attend(query, key, value, **options))
        kept = tuple(math.ceil(size / self.query_stride) for size in grid)
        x = crop_grid(x, pattern.query_grid, kept, prefix)
        return on_grid(x, prefix, lambda p: to_tokens(avg_pool2d(to_map(p, kept), 2))) if self.pools else x

    def operands(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Return query, key and value ``(B, H, N, D)`` on the padded grid, and the options of their attention.

        Args:
            x: as for :meth:`forward`.
            grid: ``(H, W)``.
        """
        pattern = self.pattern(grid)
        x = pad_grid(x, grid, pattern.grid, self.num_prefix_tokens)
        query = split_heads(_pointwise(self.q, self._queries(x, pattern)), self.num_heads)
        key, value = split_heads(_pointwise(self.kv, x), self.num_heads).split((self.dim_head, self.dim_value), dim=-1)
        reach = 2 * self.halo_size + self.block_size - 1
        bias = DecoupledBias(
            (self.pos_embed.height_rel, self.pos_embed.width_rel),
            origin=(reach + self.halo_size,) * 2,
            scaled=self.scale_pos_embed,
        )
        hidden = None if tuple(grid) == pattern.grid else _hidden(x, tuple(grid), pattern)
        return query, key, value, {"pattern": pattern, "bias": bias, "key_logits": hidden}

    def pattern(self, grid: Sequence[int]) -> Blocked:
        """Return which token sees which, on the grid padded to whole blocks."""
        return Blocked(
            tuple(math.ceil(size / self.block_size) * self.block_size for size in grid),
            self.block_size,
            self.halo_size,
            query_stride=self.query_stride,
            border="mask" if self.mask_padding else "zero",
            prefix=self.num_prefix_tokens,
        )

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Return the output's tokens along each axis."""
        return tuple(size // 2 if self.pools else math.ceil(size / self.stride) for size in grid)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: the projections, the two products and the position term."""
        pattern, prefix = self.pattern(grid), self.num_prefix_tokens
        keys, queries = math.prod(pattern.grid), math.prod(pattern.query_grid)
        window = self.block_size + 2 * self.halo_size
        pairs = queries * (window**2 + prefix) + prefix * (keys + prefix)
        wide, deep = self.num_heads * self.dim_head, self.num_heads * (self.dim_head + self.dim_value)
        projections = ((queries + prefix) * wide + (keys + prefix) * deep) * self.dim
        positions = queries * self.num_heads * self.dim_head * 2 * (2 * window - 1)
        return projections + positions + pairs * deep

    def _queries(self, x: Tensor, pattern: Blocked) -> Tensor:
        """Return the tokens that ask: the prefix, and every ``query_stride``-th along each axis."""
        if self.query_stride == 1:
            return x
        every = slice(None, None, self.query_stride)
        return on_grid(x, pattern.prefix, lambda p: p.unflatten(1, pattern.grid)[:, every, every].flatten(1, 2))

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return (
            f"dim_out={self.dim_out}, num_heads={self.num_heads}, block_size={self.block_size}, "
            f"halo_size={self.halo_size}, stride={self.stride}, mask_padding={self.mask_padding}"
        )


class RelativePosition(nn.Module):
    """A vector for each row offset and for each column offset, ``(2 w - 1, D)`` each, shared by the heads."""

    def __init__(self, window: int, dim_head: int) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head))
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=dim_head**-0.5)


def _pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """Return a 1x1 convolution of tokens ``(B, N, C)``, or what stands in its place."""
    return linear(x, conv.weight.flatten(1), conv.bias) if isinstance(conv, nn.Conv2d) else conv(x)


def _hidden(x: Tensor, grid: tuple[int, ...], pattern: Blocked) -> Tensor:
    """Return key logits ``(Nk,)`` that hide the tokens which pad ``grid``."""
    kept = pad_grid(x.new_ones(1, math.prod(grid), 1), grid, pattern.grid).flatten()
    return torch.cat((x.new_zeros(pattern.prefix), kept.log()))


def rounded(width: float, divisor: int = 8) -> int:
    """Return the multiple of 8 nearest to a width, but not below nine tenths of it, as timm rounds."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded
