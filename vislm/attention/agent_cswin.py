"""Agent attention in cross-shaped windows: every stripe has agents of its own.

Source: Agent Attention (arXiv 2312.08874), official repository LeapLabTHU/Agent-Attention; CSWin (arXiv 2107.00652).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vislm.attention.agent_core import AgentCore
from vislm.attention.cswin import check_branches
from vislm.attention.stripes import Stripes, branch_stripes
from vislm.attention.tokens import check_heads, check_tokens, per_axis


class AgentCswinAttention(nn.Module):
    """CSWin's attention with agents in place of the softmax among all tokens of a stripe.

    Vertical stripes, as high as the map and ``split_size`` wide, for the first half of the channels and heads;
    horizontal ones for the other half. In each the agents are pooled, and the values convolved, inside the stripe. The
    published models have agents only where the stripe is the whole map, one branch for all heads.

    Args:
        dim: width C.
        num_heads: H, even unless ``split_size`` is None; ``head_dim = C / H``.
        agent_num: n, agents of a stripe that the bias tables are for; a square number.
        table_size: grid of the whole map that the bias tables are for, one number or ``(h, w)``.
        split_size: width of the stripes; None = the whole map, one branch for all heads.
        agent_shape: ``(a, b)`` to pool a stripe's queries to, None = ``(sqrt n, sqrt n)``.
        kernel_size: of the depthwise convolution of the values, odd.
        qkv_bias: bias of the joint projection, rows ``[q | k | v]``.
        qk_scale: factor of the dot products, None = ``head_dim ** -0.5``.
        attn_drop: dropout of both attentions' weights.
        proj_drop: dropout behind the output projection.
        num_prefix_tokens: class and register tokens in front: keys of every stripe's agents, but neither pooled nor
            convolved. They read from the agents of all stripes and take the mean.

    The state dict has the official names, with ``attns.i.dwc`` for ``attns.i.get_v``: ``qkv, proj, attns``.

    Raises:
        UsageError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agent_num: int = 49,
        table_size: int | Sequence[int] = 14,
        split_size: int | None = None,
        *,
        agent_shape: Sequence[int] | None = None,
        kernel_size: int = 3,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        branches = check_branches(dim, num_heads, split_size)
        check_heads(dim, num_heads)
        self.dim, self.num_heads, self.split_size = dim, num_heads, split_size
        self.num_prefix_tokens = num_prefix_tokens
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        tables = [branch_stripes(per_axis("table_size", table_size, 2), split_size, index).size for index in (0, 1)]
        self.attns = nn.ModuleList(
            AgentCore(
                dim // branches,
                num_heads // branches,
                agent_num=agent_num,
                agent_shape=agent_shape,
                query_grid=size,
                key_grid=size,
                kernel_size=kernel_size,
                qk_scale=qk_scale,
                attn_drop=attn_drop,
                num_prefix_tokens=num_prefix_tokens,
            )
            for size in tables[:branches]
        )
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
        outputs: list[Tensor] = []
        for index, (attention, *qkv) in enumerate(zip(self._branches(), *branches, strict=True)):
            stripes = branch_stripes(grid, self.split_size, index)
            valid = None
            if stripes.padded != stripes.grid:
                valid = self._split(x.new_ones(*x.shape[:2], 1), stripes)[..., 0] > 0
            query, key, value = (self._split(part, stripes) for part in qkv)
            mixed = attention.mix(query, key, value, stripes.size, stripes.size, valid)
            outputs.append(self._join(mixed, stripes))
        return self.proj_drop(self.proj(torch.cat(outputs, dim=-1)))

    def _split(self, x: Tensor, stripes: Stripes) -> Tensor:
        """Return the stripes of x ``(B, R + H W, C)``, each behind the prefix tokens, ``(B S, R + h w, C)``."""
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        if self.num_prefix_tokens == 0:
            return stripes.split(patches)
        return torch.cat((prefix.repeat_interleave(math.prod(stripes.counts), dim=0), stripes.split(patches)), dim=1)

    def _join(self, x: Tensor, stripes: Stripes) -> Tensor:
        """Undo :meth:`_split`; a prefix token becomes the mean over the stripes."""
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        if self.num_prefix_tokens == 0:
            return stripes.join(patches)
        mean = prefix.unflatten(0, (-1, math.prod(stripes.counts))).mean(dim=1)
        return torch.cat((mean, stripes.join(patches)), dim=1)

    def _branches(self) -> list[AgentCore]:
        return [cast(AgentCore, attention) for attention in self.attns]

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: the projections, the products, the convolutions; whole stripes."""
        total = 4 * (math.prod(grid) + self.num_prefix_tokens) * self.dim**2
        for index, attention in enumerate(self._branches()):
            stripes = branch_stripes(grid, self.split_size, index)
            total += math.prod(stripes.counts) * attention.mixing_macs(stripes.size, stripes.size)
        return total

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return f"dim={self.dim}, num_heads={self.num_heads}, split_size={self.split_size}"
