"""Full attention with locally enhanced position encoding, and that encoding for other attentions (SG-Former).

Source: "SG-Former: Self-guided Transformer with Evolving Token Reallocation" (arXiv 2308.12216);
https://github.com/OliverRensu/SG-Former. The encoding: CSWin (arXiv 2107.00652).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from vislm.attention.tokens import check_heads, check_tokens, merge_heads, on_grid, split_heads, to_map, to_tokens
from vislm.kernels import attend


class LocallyEnhanced(nn.Module):
    """What SG-Former's attentions share: ``y = proj(attended + lepe)``, ``lepe = DW_3(lepe_linear(x))`` on the grid.

    The convolution leaves prefix tokens out; they get ``lepe_linear(x)`` alone.
    """

    def __init__(self, dim: int, num_heads: int, num_prefix_tokens: int, qk_scale: float | None, drop: float) -> None:
        super().__init__()
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        self.scale = check_heads(dim, num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.lepe_linear = nn.Linear(dim, dim)
        self.lepe_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def checked(self, x: Tensor, grid: Sequence[int]) -> tuple[int, int]:
        """Return the grid as ``(H, W)``; raise ``UsageError`` unless x has its tokens."""
        height, width = check_tokens(x, grid, self.dim, self.num_prefix_tokens, axes=2)
        return height, width

    def joined(self, x: Tensor, attended: Tensor, grid: Sequence[int]) -> Tensor:
        """Return ``proj(attended + lepe)``, ``(B, N, C)``, for the input x and what the heads gave, ``(B, N, C)``."""
        lepe = on_grid(
            self.lepe_linear(x), self.num_prefix_tokens, lambda local: to_tokens(self.lepe_conv(to_map(local, grid)))
        )
        return self.proj_drop(self.proj(attended + lepe))

    def outer_macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of position encoding and output projection for one image."""
        patches = math.prod(grid)
        return 2 * (patches + self.num_prefix_tokens) * self.dim**2 + 9 * patches * self.dim

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return f"dim={self.dim}, num_heads={self.num_heads}, num_prefix_tokens={self.num_prefix_tokens}"


class LepeAttention(LocallyEnhanced):
    """Multi-head attention among all tokens, ``proj(softmax(scale q k^T) v + lepe)``: SG-Former's last stage.

    Args:
        dim: width C.
        num_heads: H; ``head_dim = C / H``.
        qkv_bias: bias of the projections ``q`` and ``kv``.
        qk_scale: factor of the dot products, None = ``head_dim ** -0.5``.
        proj_drop: dropout behind the output projection.
        num_prefix_tokens: class and register tokens in front; they attend like the others.

    The state dict has the official names: ``q, kv`` (rows ``[k | v]``), ``lepe_linear, lepe_conv, proj``.

    Raises:
        UsageError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__(dim, num_heads, num_prefix_tokens, qk_scale, proj_drop)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            grid: ``(H, W)``.
        """
        grid = self.checked(x, grid)
        query = split_heads(self.q(x), self.num_heads)
        key, value = (split_heads(part, self.num_heads) for part in self.kv(x).chunk(2, dim=-1))
        return self.joined(x, merge_heads(attend(query, key, value, scale=self.scale)), grid)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: projections, position encoding, the two products of attention."""
        tokens = math.prod(grid) + self.num_prefix_tokens
        return self.outer_macs(grid) + 3 * tokens * self.dim**2 + 2 * tokens**2 * self.dim
