"""Mixture-of-head attention of a language model, routed by the norms of its queries: MoH-LLaMA3.

Source: "MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842); https://github.com/SkyworkAI/MoH.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vislm.attention.head_routing import QueryNormRouter
from vislm.attention.moh import default_heads, gated
from vislm.attention.tokens import check_heads, check_tokens, merge_heads, split_heads
from vislm.errors import UsageError
from vislm.kernels import Causal, Dense, attend


class MohLlamaAttention(nn.Module):
    """Causal attention with rotary positions and grouped keys, ``o_proj([gate_i head_i])`` with gates of 1 or 0.

    In a vision transformer: ``causal=False`` and ``rope_theta=None``.

    The gates are those of :class:`QueryNormRouter`: a pre-trained model needs no further parameters. Every head's keys
    and values stay, since later queries may use them.

    Args:
        dim: width C.
        num_heads: H, of queries; ``head_dim = C / H``.
        shared_heads: the heads in front that every token uses; None = half of them.
        routed_heads: how many of the others each token uses; None = half of those, rounded up.
        num_kv_heads: heads of keys and values, a divisor of H; None = H.
        rope_theta: base of the rotary frequencies, None = without.
        causal: each token sees those up to itself.
        qkv_bias: bias of the projections ``q_proj, k_proj, v_proj``.
        num_prefix_tokens: class and register tokens in front; they are tokens like the others.

    The state dict has the official names: ``q_proj, k_proj, v_proj, o_proj``.

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
        num_kv_heads: int | None = None,
        rope_theta: float | None = 10000.0,
        causal: bool = True,
        qkv_bias: bool = False,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        head_dim, kv_heads = check_heads(dim, num_heads), num_heads if num_kv_heads is None else num_kv_heads
        shared, routed = default_heads(num_heads, shared_heads, routed_heads)
        odd = rope_theta is not None and head_dim % 2
        if kv_heads < 1 or num_heads % kv_heads or odd or not 0 <= routed <= num_heads - shared:
            raise UsageError(
                f"{dim=}, {num_heads=}, num_kv_heads={kv_heads}, shared_heads={shared}, routed_heads={routed}; "
                "expected an even head_dim, num_kv_heads that divides num_heads, and no more routed heads than there "
                "are besides the shared ones"
            )
        self.dim, self.num_heads, self.num_kv_heads, self.rope_theta = dim, num_heads, kv_heads, rope_theta
        self.causal, self.num_prefix_tokens = causal, num_prefix_tokens
        self.router = QueryNormRouter(shared, routed)
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, kv_heads * head_dim, bias=qkv_bias) for _ in range(2))
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, grid: Sequence[int], mask: Tensor | None = None) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``, in order.
            grid: any sizes whose product is the number of tokens behind the prefix, such as ``(N,)``.
            mask: additive logits that broadcast to ``(B, H, N, N)``, in place of the causal pattern.
        """
        check_tokens(x, grid, self.dim, self.num_prefix_tokens, len(grid))
        query = split_heads(self.q_proj(x), self.num_heads)
        key, value = (split_heads(linear(x), self.num_kv_heads) for linear in (self.k_proj, self.v_proj))
        routing = self.router(query)
        heads = attend(
            self._rotated(query),
            self._rotated(key),
            value,
            pattern=Causal() if self.causal and mask is None else Dense(),
            bias=mask,
        )
        return self.o_proj(merge_heads(gated(heads, routing)))

    def _rotated(self, x: Tensor) -> Tensor:
        """Return x ``(B, H, N, D)`` with channel pairs ``(i, i + D / 2)`` turned by their positions' angles."""
        if self.rope_theta is None:
            return x
        half = x.shape[-1] // 2
        frequency = self.rope_theta ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * frequency
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.split(half, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one sequence with all heads: projections and the products of the attention."""
        tokens = math.prod(grid) + self.num_prefix_tokens
        projections = 2 * self.dim * (self.dim + self.num_kv_heads * self.dim // self.num_heads)
        pairs = tokens * (tokens + 1) if self.causal else 2 * tokens**2
        return tokens * projections + pairs * self.dim

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return f"dim={self.dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
