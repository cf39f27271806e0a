"""Window attention: tokens attend inside disjoint windows, plain or shifted by half a window.

Source: Swin (arXiv 2103.14030); ``timm.models.swin_transformer``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vislm.attention.dropout import attend_dropping
from vislm.attention.tokens import (
    check_heads,
    check_tokens,
    crop_grid,
    merge_heads,
    on_grid,
    pad_grid,
    per_axis,
    split_heads,
)
from vislm.kernels import RelativeBias, Window


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, ``proj(softmax(scale q k^T + bias, in the window) v)``.

    A grid that is no multiple of the window is padded with zero tokens, which take part (as in Swin). An axis that is
    not longer than the window is one window, without a shift.

    Args:
        dim: width C.
        num_heads: H; ``head_dim = C / H``.
        window_size: tokens along each axis of a window; one number for the two axes of a map, or one per axis (1 to 3).
        shifted: shift the windows by half their size.
        rel_pos_bias: learn a table of logits by relative position, ``relative_position_bias_table
            ((2M_1 - 1) (2M_2 - 1) .., H)``. It takes no weight decay.
        qkv_bias: bias of the joint projection, rows ``[q | k | v]``.
        qk_scale: factor of the dot products, None = ``head_dim ** -0.5``.
        attn_drop: dropout of the attention weights; in training it forms all of them.
        proj_drop: dropout behind the output projection.
        num_prefix_tokens: class and register tokens in front: seen by every token, seeing every token.

    The state dict has timm's names: ``qkv, proj, relative_position_bias_table``.

    Raises:
        UsageError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        *,
        shifted: bool = False,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        self.scale = check_heads(dim, num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.window_size = per_axis("window_size", window_size, 2 if isinstance(window_size, int) else len(window_size))
        self.shifted, self.attn_drop = shifted, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.relative_position_bias_table = None
        if rel_pos_bias:
            entries = math.prod(2 * size - 1 for size in self.window_size)
            self.relative_position_bias_table = nn.Parameter(torch.empty(entries, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.prefix_logits: Tensor | None = None  # those of a model whose attention this one replaces

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that take no weight decay."""
        return {"relative_position_bias_table"}

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            grid: tokens along each axis, such as ``(H, W)``.
        """
        grid = check_tokens(x, grid, self.dim, self.num_prefix_tokens, len(self.window_size))
        pattern, table = self.pattern(grid), self.relative_position_bias_table
        x = padded(x, grid, pattern)
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        x = attend_dropping(
            query,
            key,
            value,
            self.attn_drop if self.training else 0.0,
            pattern=pattern,
            bias=None if table is None else RelativeBias.swin(table, self.window_size),
            scale=self.scale,
            prefix_logits=self.prefix_logits,
        )
        x = _cropped(merge_heads(x), grid, pattern)
        return self.proj_drop(self.proj(x))

    def pattern(self, grid: Sequence[int]) -> Window:
        """Return which token sees which, on the grid padded to whole windows."""
        window = tuple(map(min, self.window_size, grid))
        shift = tuple(w // 2 if self.shifted and w < size else 0 for w, size in zip(window, grid, strict=True))
        padded = tuple(math.ceil(size / w) * w for w, size in zip(window, grid, strict=True))
        return Window(padded, window, shift, prefix=self.num_prefix_tokens)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: the projections and the two products of the attention.

        Shifted windows count as whole ones; those that the border cuts need a little less.
        """
        pattern = self.pattern(grid)
        patches, prefix = math.prod(pattern.grid), self.num_prefix_tokens
        pairs = patches * (math.prod(pattern.window) + prefix) + prefix * (patches + prefix)
        return 4 * (patches + prefix) * self.dim**2 + 2 * pairs * self.dim

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, shifted={self.shifted}, "
            f"num_prefix_tokens={self.num_prefix_tokens}"
        )


def padded(x: Tensor, grid: tuple[int, ...], pattern: Window) -> Tensor:
    """Return prefix and grid tokens ``(B, N, C)`` with zero tokens where Swin has them.

    Swin rolls the map back by the shift, pads its end, and cuts windows without a shift. Rolled forward again, those
    windows are the pattern's; without padding the two rolls cancel.
    """
    if grid == pattern.grid:
        return x
    x = _rolled(x, grid, [-shift for shift in pattern.shift], pattern.prefix)
    return _rolled(pad_grid(x, grid, pattern.grid, pattern.prefix), pattern.grid, pattern.shift, pattern.prefix)


def _cropped(x: Tensor, grid: tuple[int, ...], pattern: Window) -> Tensor:
    """Undo :func:`padded`."""
    if grid == pattern.grid:
        return x
    x = _rolled(x, pattern.grid, [-shift for shift in pattern.shift], pattern.prefix)
    return _rolled(crop_grid(x, pattern.grid, grid, pattern.prefix), grid, pattern.shift, pattern.prefix)


def _rolled(x: Tensor, grid: tuple[int, ...], shifts: Sequence[int], num_prefix: int) -> Tensor:
    axes = tuple(range(1, len(grid) + 1))
    return on_grid(x, num_prefix, lambda p: p.unflatten(1, grid).roll(tuple(shifts), axes).flatten(1, -2))
