"""Neighborhood attention: each token attends to the window of keys around it, pushed inward at the borders.

Source: NAT (arXiv 2204.07143), DiNAT (2209.15001), GNA (2504.16922); https://github.com/SHI-Labs/NATTEN and
https://github.com/SHI-Labs/Neighborhood-Attention-Transformer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vislm.attention.dropout import attend_dropping
from vislm.attention.tokens import check_heads, check_tokens, crop_grid, merge_heads, pad_grid, per_axis, split_heads
from vislm.errors import UnknownName, UsageError
from vislm.kernels import Neighborhood, RelativeBias

SMALL_INPUT = ("raise", "pad", "shrink")


class NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention, ``proj(softmax(scale q k^T + rpb, on the neighborhood) v)``.

    Args:
        dim: width C.
        num_heads: H; ``head_dim = C / H``.
        window_size: keys along each axis; one number for the two axes of a map, or one per axis (1 to 3).
        stride: queries that share a window, one number or one per axis.
        dilation: distance between the window's keys, one number or one per axis.
        causal: hide later keys, for all axes or one flag each; not together with ``rel_pos_bias``.
        rel_pos_bias: learn a table ``rpb (H, 2 w_1 - 1, ...)`` of logits by relative position, as the published
            NAT and DiNAT checkpoints have. It takes no weight decay.
        qkv_bias: bias of the joint projection, rows ``[q | k | v]``.
        qk_scale: factor of the dot products, None = ``head_dim ** -0.5``.
        attn_drop: dropout of the attention weights; in training it forms all of them.
        proj_drop: dropout behind the output projection.
        small_input: what to do with a grid smaller than ``window_size * dilation``: ``"raise"``; ``"pad"`` with zero
            tokens in front of the projection, which take part (as the published models did); or ``"shrink"`` to the
            largest window that fits.
        border: ``"shift"`` as published, or ``"mask"``: the window stays centred and loses the keys outside the grid.
        num_prefix_tokens: class and register tokens in front: seen by every token, seeing every token.

    The state dict has the official names: ``qkv, proj, rpb``.

    Raises:
        UsageError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        *,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        small_input: Literal["raise", "pad", "shrink"] = "raise",
        border: Literal["shift", "mask"] = "shift",
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        if small_input not in SMALL_INPUT:
            raise UnknownName("small_input", str(small_input), SMALL_INPUT)
        axes = len(window_size) if isinstance(window_size, Sequence) else 2
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        self.scale = check_heads(dim, num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.window_size = per_axis("window_size", window_size, axes)
        self.stride, self.dilation = per_axis("stride", stride, axes), per_axis("dilation", dilation, axes)
        self.causal, self.small_input = causal, small_input
        self.border: Literal["shift", "mask"] = border
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * size - 1 for size in self.window_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.prefix_logits: Tensor | None = None  # those of a model whose attention this one replaces
        least = tuple(max(1, w * d) for w, d in zip(self.window_size, self.dilation, strict=True))
        if any(self.pattern(least).causal) and rel_pos_bias:
            raise UsageError(f"{rel_pos_bias=} is not defined with {causal=}; use one of the two")

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that take no weight decay."""
        return {"rpb"}

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            grid: tokens along each axis, such as ``(H, W)``.
        """
        grid = check_tokens(x, grid, self.dim, self.num_prefix_tokens, len(self.window_size))
        pattern = self.pattern(grid)
        x = pad_grid(x, grid, pattern.grid, self.num_prefix_tokens)
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        x = attend_dropping(
            query,
            key,
            value,
            self.attn_drop if self.training else 0.0,
            pattern=pattern,
            bias=None if self.rpb is None else RelativeBias(self.rpb),
            scale=self.scale,
            prefix_logits=self.prefix_logits,
        )
        x = crop_grid(merge_heads(x), pattern.grid, grid, self.num_prefix_tokens)
        return self.proj_drop(self.proj(x))

    def pattern(self, grid: Sequence[int]) -> Neighborhood:
        """Return which token sees which on a grid, padded if need be; raise ``UsageError`` if it is too small."""
        window, dilation, sizes = self.window_size, self.dilation, tuple(grid)
        if self.small_input == "pad":
            sizes = tuple(max(size, w * d) for size, w, d in zip(sizes, window, dilation, strict=True))
        elif self.small_input == "shrink":
            dilation = tuple(min(size, d) for size, d in zip(sizes, dilation, strict=True))
            window = tuple(min(w, size // d) for size, w, d in zip(sizes, window, dilation, strict=True))
        return Neighborhood(
            sizes,
            window,
            stride=self.stride if window == self.window_size else tuple(map(min, self.stride, window)),
            dilation=dilation,
            causal=self.causal,
            border=self.border,
            prefix=self.num_prefix_tokens,
        )

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: the projections and the two products of the attention."""
        pattern = self.pattern(grid)
        patches, prefix = math.prod(pattern.grid), self.num_prefix_tokens
        pairs = patches * (math.prod(pattern.window) + prefix) + prefix * (patches + prefix)
        return 4 * (patches + prefix) * self.dim**2 + 2 * pairs * self.dim

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, stride={self.stride}, "
            f"dilation={self.dilation}, causal={self.causal}, small_input={self.small_input!r}"
        )
