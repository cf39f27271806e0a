"""Mixture-of-head attention: each token uses a few of the heads, each weighed by a router.

Source: "MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842); https://github.com/SkyworkAI/MoH.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from vislm.attention.active_heads import attend_active
from vislm.attention.head_routing import HeadRouter, Routing
from vislm.attention.tokens import check_heads, check_tokens, merge_heads, split_heads
from vislm.errors import UsageError
from vislm.kernels import attend


class MohAttention(nn.Module):
    """``proj([gate_i head_i])`` with ``head_i = softmax(scale q_i k_i^T) v_i``, the gates of :class:`HeadRouter`.

    This is the form of MoH-DiT, for any plain ViT. Gates depend on the query's token; keys and values of all heads are
    computed. Training adds the loss of
    :func:`vislm.attention.head_routing.load_balance_losses`.

    Args:
        dim: width C.
        num_heads: H.
        shared_heads: the heads in front that every token uses; None = half of them.
        routed_heads: how many of the others each token uses; None = half of those, rounded up.
        head_dim: width of a head, None = ``C / H``.
        qkv_bias: bias of the joint projection, rows ``[q | k | v]``.
        qk_norm: LayerNorm of each head's queries and keys.
        qk_scale: factor of the dot products, None = ``head_dim ** -0.5``.
        proj_drop: dropout behind the output projection.
        num_prefix_tokens: class and register tokens in front; they are routed like the others.
        skip_heads: compute used (token, head) pairs only; None = where that is faster, on large grids.

    The state dict has the official names, with the routers apart: ``qkv, q_norm, k_norm, proj, router.wg, router.wg_0,
    router.wg_1``.

    Raises:
        UsageError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
        skip_heads: bool | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (head_dim is not None and head_dim < 1):
            raise UsageError(f"{num_heads=}, {head_dim=}; expected 1 or more")
        width = check_heads(dim, num_heads) if head_dim is None else head_dim
        self.dim, self.num_heads, self.head_dim, self.num_prefix_tokens = dim, num_heads, width, num_prefix_tokens
        self.scale = width**-0.5 if qk_scale is None else qk_scale
        self.skip_heads = skip_heads
        shared, routed = default_heads(num_heads, shared_heads, routed_heads)
        self.qkv = nn.Linear(dim, 3 * num_heads * width, bias=qkv_bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(width) if qk_norm else nn.Identity() for _ in range(2))
        self.router = HeadRouter(dim, num_heads, shared, routed)
        self.proj = nn.Linear(num_heads * width, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens.
            grid: tokens along each axis; only their number matters.
        """
        check_tokens(x, grid, self.dim, self.num_prefix_tokens, len(grid))
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        query, key, routing = self.q_norm(query), self.k_norm(key), self.router(x)
        if routing.kept is not None and self.router.skips(self.skip_heads, x.shape[1]):
            heads = attend_active(query, key, value, routing.kept, scale=self.scale)
        else:
            heads = attend(query, key, value, scale=self.scale)
        return self.proj_drop(self.proj(merge_heads(gated(heads, routing))))

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image with all heads: projections, routers, the products of attention."""
        tokens, inner = math.prod(grid) + self.num_prefix_tokens, self.num_heads * self.head_dim
        return 4 * tokens * inner * self.dim + 2 * tokens**2 * inner + self.router.macs(tokens)

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, skip_heads={self.skip_heads}"


def gated(heads: Tensor, routing: Routing) -> Tensor:
    """Return the heads' outputs ``(B, H, N, D)`` times their gates."""
    return heads * routing.gate.transpose(1, 2)[..., None].to(heads.dtype)


def default_heads(num_heads: int, shared_heads: int | None, routed_heads: int | None) -> tuple[int, int]:
    """Return the numbers of shared heads and of routed heads in use: half of all, half of the others."""
    shared = num_heads // 2 if shared_heads is None else shared_heads
    return shared, (num_heads - shared + 1) // 2 if routed_heads is None else routed_heads
