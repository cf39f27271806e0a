"""Agent attention: a few tokens pooled from the queries gather from all keys, then hand on to all queries.

Source: Han, Ye, Han, Xia, Pan, Wan, Song, Huang, *Agent Attention: On the Integration of Softmax and Linear Attention*
(ECCV 2024, arXiv 2312.08874); official repository LeapLabTHU/Agent-Attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vislm.attention.agent_core import AgentCore
from vislm.attention.tokens import check_tokens, pad_grid, per_axis, to_map, to_tokens
from vislm.errors import UsageError


class AgentAttention(AgentCore):
    """Agent attention, ``proj(softmax(scale q A^T + B2) softmax(scale A k^T + B1) v + DW(v))``, linear in the tokens.

    A are the agents, means of the queries over the cells of an ``a x b`` grid (cells of adaptive average pooling, which
    overlap where ``a`` does not divide the map). B1 and B2 are learned position biases; on a grid other than
    ``table_size``, or with another ``agent_shape``, they are resized (see :class:`AgentBias`), so that any resolution
    works. More agents along an axis than tokens repeat each other; that is allowed, with a warning.

    Args:
        dim: width C.
        num_heads: H; ``head_dim = C / H``.
        agent_num: n, agents that the bias tables are for; a square number.
        table_size: grid that the bias tables are for, one number or ``(h, w)``.
        agent_shape: ``(a, b)`` to pool the queries to, None = ``(sqrt n, sqrt n)``; larger for dense prediction.
        separate_kv: two projections ``q`` and ``kv`` (rows ``[k | v]``), as in Agent-PVT, and not one ``qkv``.
        sr_ratio: r; keys and values come from the map reduced by a convolution of size and stride r and a LayerNorm
            (with ``separate_kv``). A map that is no multiple of r is padded with zeros.
        kernel_size: of the depthwise convolution of the values, odd.
        qkv_bias: biases of the projections.
        qk_scale: factor of the dot products, None = ``head_dim ** -0.5``.
        attn_drop: dropout of both attentions' weights.
        proj_drop: dropout behind the output projection.
        num_prefix_tokens: R, class and register tokens in front: keys of the agents and queries, but neither pooled nor
            convolved.

    The state dict has the official names: ``qkv`` (or ``q, kv, sr, norm``), ``proj, dwc`` and the tables of
    :class:`AgentBias`. Put in place of a pretrained softmax attention it needs fine-tuning.

    Raises:
        UsageError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agent_num: int = 49,
        table_size: int | Sequence[int] = 14,
        *,
        agent_shape: Sequence[int] | None = None,
        separate_kv: bool = False,
        sr_ratio: int = 1,
        kernel_size: int = 3,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
    ) -> None:
        if sr_ratio < 1 or (sr_ratio > 1 and (not separate_kv or num_prefix_tokens)):
            raise UsageError(
                f"{sr_ratio=} with {separate_kv=} and {num_prefix_tokens=}; reduced keys need separate_kv=True and no "
                "prefix tokens"
            )
        rows, columns = per_axis("table_size", table_size, 2)
        super().__init__(
            dim,
            num_heads,
            agent_num=agent_num,
            agent_shape=agent_shape,
            query_grid=(rows, columns),
            key_grid=_reduced((rows, columns), sr_ratio),
            kernel_size=kernel_size,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            num_prefix_tokens=num_prefix_tokens,
        )
        self.sr_ratio, self.separate_kv = sr_ratio, separate_kv
        if separate_kv:
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Sequence[int], valid: Tensor | None = None) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            grid: ``(H, W)``.
            valid: ``(B, N)`` bool, False = padding: hidden as a key, left out of pooling and convolution; its own
                output means nothing. Not with ``sr_ratio`` above 1.
        """
        grid = check_tokens(x, grid, self.dim, self.num_prefix_tokens, 2)
        if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != torch.bool or self.sr_ratio > 1):
            raise UsageError(
                f"valid is {valid.dtype} {tuple(valid.shape)} with sr_ratio={self.sr_ratio}, expected torch.bool "
                f"(B, N) = {tuple(x.shape[:2])} and sr_ratio=1"
            )
        query, key, value = self.projected(x, grid)
        x = self.mix(query, key, value, grid, _reduced(grid, self.sr_ratio), valid)
        return self.proj_drop(self.proj(x))

    def projected(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, ...]:
        """Return queries ``(B, N, C)``, and keys and values of the reduced grid where ``sr_ratio`` reduces it."""
        if not self.separate_kv:
            return self.qkv(x).chunk(3, dim=-1)
        source = x
        if self.sr_ratio > 1:
            whole = tuple(size * self.sr_ratio for size in _reduced(grid, self.sr_ratio))
            source = self.norm(to_tokens(self.sr(to_map(pad_grid(x, grid, whole), whole))))
        return self.q(x), *self.kv(source).chunk(2, dim=-1)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: the projections, the attentions' products and the convolutions."""
        tokens, key_grid = self.num_prefix_tokens + math.prod(grid), _reduced(grid, self.sr_ratio)
        keys = self.num_prefix_tokens + math.prod(key_grid)
        reduction = keys * self.sr.weight.numel() if self.sr_ratio > 1 else 0
        return (2 * tokens + 2 * keys) * self.dim**2 + reduction + self.mixing_macs(grid, key_grid)


def _reduced(grid: Sequence[int], ratio: int) -> tuple[int, int]:
    rows, columns = (math.ceil(size / ratio) for size in grid)
    return rows, columns
