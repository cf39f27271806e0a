"""What happens among super tokens between sampling them and reading them back: ``forward(x, grid)``.

Source: "Vision Transformer with Super Token Sampling" (arXiv 2211.11167); https://github.com/hhb072/STViT.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vislm.attention.dropout import attend_dropping
from vislm.attention.pointwise import Pointwise
from vislm.attention.tokens import check_heads, merge_heads, on_grid, to_map, to_tokens
from vislm.kernels import Dense


class AttentionRefine(nn.Module):
    """Multi-head attention, ``proj(softmax(scale q k^T) v)``; prefix tokens take part.

    The rows of ``qkv`` are grouped by head: ``[q_0 k_0 v_0 | q_1 k_1 v_1 | ...]``.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, qk_scale: float | None, attn_drop: float, proj_drop: float
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.attn_drop = dim, num_heads, attn_drop
        self.scale = check_heads(dim, num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.qkv = Pointwise(dim, 3 * dim, bias=qkv_bias)
        self.proj = Pointwise(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return ``(B, M, C)``; the grid does not matter."""
        heads = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).transpose(1, 2)  # (B, H, M, 3, D)
        query, key, value = heads.unbind(3)
        dropped = self.attn_drop if self.training else 0.0
        x = attend_dropping(query, key, value, dropped, pattern=Dense(), scale=self.scale)
        return self.proj_drop(self.proj(merge_heads(x)))

    def macs(self, num_tokens: int, num_prefix: int) -> int:
        """Return the multiply-adds of so many super tokens and prefix tokens."""
        count = num_tokens + num_prefix
        return 4 * count * self.dim**2 + 2 * count**2 * self.dim


class ConvRefine(nn.ModuleList):
    """A 1x1, a depthwise 5x5 and a 1x1 convolution; prefix tokens stay as they are."""

    def __init__(self, dim: int, num_prefix_tokens: int) -> None:
        depthwise = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        super().__init__([nn.Conv2d(dim, dim, 1), depthwise, nn.Conv2d(dim, dim, 1)])
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return ``(B, M, C)`` for prefix tokens and those of the grid of cells."""
        return on_grid(x, self.num_prefix_tokens, lambda s: to_tokens(self._convolved(to_map(s, grid))))

    def _convolved(self, x: Tensor) -> Tensor:
        for conv in self:
            x = conv(x)
        return x

    def macs(self, num_tokens: int, num_prefix: int) -> int:
        """Return the multiply-adds of so many super tokens; prefix tokens need none."""
        return num_tokens * sum(parameter.numel() for parameter in self.parameters() if parameter.ndim > 1)
