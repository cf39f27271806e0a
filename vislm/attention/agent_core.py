"""The two attentions of agent attention and its convolution, on queries, keys and values that others project.

Source: Agent Attention (arXiv 2312.08874); https://github.com/LeapLabTHU/Agent-Attention.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, pad

from vislm.attention.agent_bias import AgentBias
from vislm.attention.dropout import attend_dropping
from vislm.attention.tokens import check_heads, merge_heads, per_axis, split_heads, to_map, to_tokens
from vislm.errors import UsageError
from vislm.kernels import Dense, Padded


class AgentCore(AgentBias):
    """``softmax(scale q A^T + B2) (softmax(scale A k^T + B1) v) + DW(v)`` with agents A pooled from the queries.

    Args:
        dim: width C.
        num_heads: H.
        agent_num: n, agents that the bias tables are for; a square number.
        agent_shape: ``(a, b)``, how many agents the queries are pooled to, None = ``(sqrt n, sqrt n)``.
        query_grid: ``(h, w)`` that the bias tables are for.
        key_grid: the same for the keys.
        kernel_size: of the depthwise convolution of the values, odd.
        qk_scale: factor of the dot products, None = ``head_dim ** -0.5``.
        attn_drop: dropout of both attentions' weights.
        num_prefix_tokens: R, tokens in front: not pooled and not convolved.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        agent_num: int,
        agent_shape: Sequence[int] | None,
        query_grid: tuple[int, int],
        key_grid: tuple[int, int],
        kernel_size: int,
        qk_scale: float | None,
        attn_drop: float,
        num_prefix_tokens: int,
    ) -> None:
        side = math.isqrt(max(agent_num, 0))
        if side < 1 or side**2 != agent_num:
            raise UsageError(f"{agent_num=}, expected a square number such as 49; agent_shape may be any (a, b)")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(f"{kernel_size=}, expected an odd number")
        super().__init__(num_heads, side, query_grid, key_grid, num_prefix_tokens)
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        self.scale = check_heads(dim, num_heads) ** -0.5 if qk_scale is None else qk_scale
        rows, columns = (side, side) if agent_shape is None else per_axis("agent_shape", agent_shape, 2)
        if min(rows, columns) < 1:
            raise UsageError(f"{agent_shape=}, expected two positive numbers")
        self.agent_shape, self.attn_drop = (rows, columns), attn_drop
        self.dwc = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: Sequence[int],
        key_grid: Sequence[int],
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the heads' outputs side by side, ``(B, R + h w, C)``, in front of any projection.

        Args:
            query: ``(B, R + h w, C)``.
            key: ``(B, R + h_k w_k, C)``.
            value: like the key.
            grid: ``(h, w)``.
            key_grid: ``(h_k, w_k)``.
            valid: ``(B, R + h w)`` bool, False = padding: hidden as a key, left out of the pooling and the convolution.
                Only where the keys are on the queries' grid.
        """
        prefix, shape = self.num_prefix_tokens, self.agent_shape
        crowded = any(agents > size for agents, size in zip(shape, grid, strict=True))
        if crowded and not torch.compiler.is_compiling():
            warnings.warn(f"{shape} agents on a map of {tuple(grid)}: some repeat each other", stacklevel=3)
        if valid is not None:
            value = value * valid[..., None]
        agents = self.pooled(query[:, prefix:], grid, None if valid is None else valid[:, prefix:])
        x = self._through(agents, query, key, value, grid, key_grid, valid)
        local = to_map(value[:, prefix:], key_grid)
        if tuple(key_grid) != tuple(grid):
            local = interpolate(local, tuple(grid), mode="bilinear", align_corners=False)
        local = to_tokens(self.dwc(local))
        return x + (local if prefix == 0 else pad(local, (0, 0, prefix, 0)))

    def _through(
        self,
        agents: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: Sequence[int],
        key_grid: Sequence[int],
        valid: Tensor | None,
    ) -> Tensor:
        """Return what the agents gather from keys and values and hand on to the queries, ``(B, R + h w, C)``."""
        heads_q, heads_a, heads_k, heads_v = (split_heads(part, self.num_heads) for part in (query, agents, key, value))
        dropped, shape = self.attn_drop if self.training else 0.0, self.agent_shape
        gathered = attend_dropping(
            heads_a,
            heads_k,
            heads_v,
            dropped,
            pattern=Dense() if valid is None else Padded(valid),
            bias=self.agent_to_key(key_grid, shape),
            scale=self.scale,
        )
        bias = self.query_to_agent(grid, shape)
        x = attend_dropping(heads_q, heads_a, gathered, dropped, pattern=Dense(), bias=bias, scale=self.scale)
        return merge_heads(x)

    def pooled(self, query: Tensor, grid: Sequence[int], valid: Tensor | None = None) -> Tensor:
        """Return the agents ``(B, n', C)`` of the grid's queries ``(B, h w, C)``: means over cells, of valid tokens."""
        if valid is None:
            return to_tokens(adaptive_avg_pool2d(to_map(query, grid), self.agent_shape))
        weights = valid[..., None].to(query.dtype)
        total = adaptive_avg_pool2d(to_map(query * weights, grid), self.agent_shape)
        share = adaptive_avg_pool2d(to_map(weights, grid), self.agent_shape)
        return to_tokens(total / share.masked_fill(share == 0, 1.0))

    def mixing_macs(self, grid: Sequence[int], key_grid: Sequence[int]) -> int:
        """Return the multiply-adds of the four products of the attentions and of the convolution."""
        queries, keys = (self.num_prefix_tokens + math.prod(sizes) for sizes in (grid, key_grid))
        products = 2 * math.prod(self.agent_shape) * (queries + keys) * self.dim
        return products + math.prod(grid) * self.dwc.weight.numel()

    def extra_repr(self) -> str:
        """Return the options for ``print(module)``."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, agent_shape={self.agent_shape}, "
            f"num_prefix_tokens={self.num_prefix_tokens}"
        )
