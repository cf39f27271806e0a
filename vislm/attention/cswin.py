"""Cross-shaped windows: half of the heads attend inside vertical stripes, the other half inside horizontal ones.

Source: CSWin (arXiv 2107.00652); https://github.com/microsoft/CSWin-Transformer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vislm.attention.dropout import attend_dropping
from vislm.attention.stripes import Stripes, branch_stripes
from vislm.attention.tokens import check_heads, check_tokens, merge_heads, on_grid, split_heads
from vislm.errors import UsageError
from vislm.kernels import Dense, Window


class CswinAttention(nn.Module):
    """``proj([softmax(scale q k^T) v + DW(v), in the stripe])``, side by side for vertical and horizontal stripes.

    Vertical stripes are as high as the map and ``split_size`` wide, for the first half of the channels and heads;
    horizontal ones are the transpose, for the other half. Where ``split_size`` does not divide a side, the last stripe
    is narrower.

    Args:
        dim: width C.
        num_heads: H, even unless ``split_size`` is None; ``head_dim = C / H``.
        split_size: width of the stripes; None = the whole map, one branch for all heads.
        kernel_size: of the depthwise convolution of the values, odd; it stops at the stripes' borders.
        qkv_bias: bias of the joint projection, rows ``[q | k | v]``.
        qk_scale: factor of the dot products, None = ``head_dim ** -0.5``.
        attn_drop: dropout of the attention weights; in training it forms all of them.
        proj_drop: dropout behind the output projection.
        num_prefix_tokens: class and register tokens in front: seen by every token, seeing every token, not convolved.

    The state dict has the official names, with ``attns.i.dwc`` for ``attns.i.get_v``: ``qkv, proj, attns``.

    Raises:
        UsageError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split_size: int | None = 7,
        *,
        kernel_size: int = 3,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        branches = check_branches(dim, num_heads, split_size)
        self.dim, self.num_heads, self.split_size = dim, num_heads, split_size
        self.num_prefix_tokens, self.attn_drop = num_prefix_tokens, attn_drop
        self.scale = check_heads(dim, num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attns = nn.ModuleList(ValueConv(dim // branches, kernel_size) for _ in range(branches))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            grid: ``(H, W)``.
        """
        grid = check_tokens(x, grid, self.dim, self.num_prefix_tokens, 2)
        branches = [part.chunk(len(self.attns), dim=-1) for part in self.qkv(x).chunk(3, dim=-1)]
        parts = enumerate(zip(*branches, strict=True))
        x = torch.cat([self._branch(index, query, key, value, grid) for index, (query, key, value) in parts], dim=-1)
        return self.proj_drop(self.proj(x))

    def _branch(self, index: int, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Return one branch's heads side by side, ``(B, N, C / branches)``."""
        stripes, heads = branch_stripes(grid, self.split_size, index), self.num_heads // len(self.attns)
        attended = attend_dropping(
            split_heads(query, heads),
            split_heads(key, heads),
            split_heads(value, heads),
            self.attn_drop if self.training else 0.0,
            pattern=Dense() if stripes.size == grid else Window(grid, stripes.size, prefix=self.num_prefix_tokens),
            scale=self.scale,
        )
        local = self.attns[index](value[:, self.num_prefix_tokens :], stripes)
        return on_grid(merge_heads(attended), self.num_prefix_tokens, lambda patches: patches + local)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: the projections, the products of the attention, the convolutions."""
        patches, prefix, total = math.prod(grid), self.num_prefix_tokens, 0
        for index, conv in enumerate(self.attns):
            stripes = branch_stripes(grid, self.split_size, index)
            pairs = stripes.pairs + 2 * patches * prefix + prefix**2
            total += 2 * pairs * self.dim // len(self.attns)
            total += patches * sum(p.numel() for p in conv.parameters() if p.ndim > 1)
        return total + 4 * (patches + prefix) * self.dim**2

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return f"dim={self.dim}, num_heads={self.num_heads}, split_size={self.split_size}"


class ValueConv(nn.Module):
    """A depthwise convolution of the values inside each stripe (locally enhanced positional encoding)."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(f"{kernel_size=}, expected an odd number")
        self.dwc = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, value: Tensor, stripes: Stripes) -> Tensor:
        """Return ``(B, H W, C)`` for values of that shape."""
        maps = stripes.split(value).unflatten(1, stripes.size).permute(0, 3, 1, 2)
        return stripes.join(self.dwc(maps).permute(0, 2, 3, 1).flatten(1, 2))


def check_branches(dim: int, num_heads: int, split_size: int | None) -> int:
    """Return the number of branches: 2 for stripes, 1 for the whole map; raise ``UsageError`` for unfit sizes."""
    if split_size is None:
        return 1
    if split_size < 1 or num_heads % 2 or dim % 2:
        raise UsageError(f"{split_size=}, {num_heads=}, {dim=}: stripes need a positive split_size and even numbers")
    return 2
