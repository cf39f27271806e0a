"""Plain multi-head attention: every token attends to every token.

Source: ViT (arXiv 2010.11929) and DeiT (arXiv 2012.12877); ``timm.models.vision_transformer``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from vislm.attention.dropout import attend_dropping
from vislm.attention.tokens import check_heads, check_tokens, merge_heads, split_heads
from vislm.kernels import Dense


class DenseAttention(nn.Module):
    """Multi-head attention among all tokens, ``proj(softmax(scale q k^T) v)``.

    Args:
        dim: width C.
        num_heads: H; ``head_dim = C / H``.
        qkv_bias: bias of the joint projection, rows ``[q | k | v]``.
        qk_scale: factor of the dot products, None = ``head_dim ** -0.5``.
        attn_drop: dropout of the attention weights; in training it forms all of them.
        proj_drop: dropout behind the output projection.
        num_prefix_tokens: class and register tokens in front.

    The state dict has timm's names: ``qkv, proj``.

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
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        self.scale = check_heads(dim, num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens.
            grid: tokens along each axis, such as ``(H, W)``.
        """
        check_tokens(x, grid, self.dim, self.num_prefix_tokens, len(grid))
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        dropped = self.attn_drop if self.training else 0.0
        x = attend_dropping(query, key, value, dropped, pattern=Dense(), scale=self.scale)
        return self.proj_drop(self.proj(merge_heads(x)))

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: the projections and the two products of the attention."""
        tokens = self.num_prefix_tokens + math.prod(grid)
        return 4 * tokens * self.dim**2 + 2 * tokens**2 * self.dim

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return f"dim={self.dim}, num_heads={self.num_heads}, num_prefix_tokens={self.num_prefix_tokens}"
