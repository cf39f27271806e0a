"""Mixture-of-head attention to a window and to the pooled map at once: MoH-ViT's first stages.

Source: TransNeXt (arXiv 2311.17132), MoH (arXiv 2410.11842); https://github.com/SkyworkAI/MoH.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, gelu, normalize, pad

from vislm.attention.moh import gated
from vislm.attention.moh_pooled import PooledGrid, attend_pooled
from vislm.attention.moh_position import CosineHeads
from vislm.attention.pointwise import pointwise
from vislm.attention.tokens import check_tokens, crop_grid, merge_heads, pad_grid, split_heads, to_map, to_tokens
from vislm.errors import UsageError
from vislm.kernels import Neighborhood, RelativeBias, StatisticsRequest, attend


class MohAggregatedAttention(CosineHeads):
    """``proj([gate_i head_i])``, each head one softmax over the window around a token and the pooled map.

    ``head = sum_j (q . T_j + b_j + a_j) v_j + a_pool v_pool`` with the weights ``(a, a_pool)`` of the cosine logits
    (see :class:`CosineHeads`) over the window's tokens j inside the image and the pooled tokens, unit queries q, and
    learned ``T`` and ``b`` per place in the window.

    Args:
        dim: width C.
        num_heads: H; ``head_dim = C / H``.
        shared_heads: the heads in front that every token uses; None = half of them.
        routed_heads: how many of the others each token uses; None = half of those, rounded up.
        window_size: side of the window, odd.
        sr_ratio: the map is pooled to its sides over this, rounded down.
        pretrained_grid: sides of the grid in pre-training, one number or one per axis: the unit of the position bias.
        qkv_bias: bias of the projections.
        proj_drop: dropout behind the output projection.
        skip_heads: attend to the pooled map for used (token, head) pairs only; None = where that is faster.
        num_prefix_tokens: class and register tokens in front: seen by every token, seeing every token (not the pooled
            ones), without position biases and the learned maps of the window.

    The state dict has the official names, with the routers apart: ``q, kv`` (rows ``[k | v]``), ``sr, norm,
    query_embedding, temperature, relative_pos_bias_local, learnable_tokens, learnable_bias, cpb_fc1, cpb_fc2, proj,
    router.wg, router.wg_0, router.wg_1``.

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
        window_size: int = 3,
        sr_ratio: int = 8,
        pretrained_grid: int | Sequence[int] = 56,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        skip_heads: bool | None = None,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__(dim, num_heads, shared_heads, routed_heads, pretrained_grid, proj_drop)
        if window_size < 1 or window_size % 2 == 0 or sr_ratio < 1:
            raise UsageError(f"{window_size=}, {sr_ratio=}; expected an odd window and a ratio of 1 or more")
        self.window_size, self.sr_ratio, self.skip_heads = window_size, sr_ratio, skip_heads
        self.num_prefix_tokens = num_prefix_tokens
        head_dim, places = dim // num_heads, window_size**2
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, places))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, head_dim, places))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, places))
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=4e-4)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            grid: ``(H, W)``.
        """
        prefix = self.num_prefix_tokens
        height, width = check_tokens(x, grid, self.dim, prefix, axes=2)
        pooled = PooledGrid((height, width), self.sr_ratio)
        reduced = gelu(pointwise(self.sr, x[:, prefix:]))
        coarse = to_tokens(adaptive_avg_pool2d(to_map(reduced, grid), pooled.sides))
        unit = normalize(split_heads(self.q(x), self.num_heads), dim=-1)
        query = self.scaled(unit, self.visible(grid, math.prod(pooled.sides)))
        key, value = self.keys_values(x)
        routing = self.router(x)
        local, lse = self._attend_window(query, key, value, (height, width))
        # Gathering the bias costs about half of what the spared keys would.
        kept = routing.kept if self.router.skips(self.skip_heads, math.prod(pooled.sides) // 2) else None
        heads = attend_pooled(
            query[:, :, prefix:],
            *self.keys_values(self.norm(coarse)),
            self.bias_table(*pooled.offsets()),
            pooled,
            (local[:, :, prefix:], lse[:, :, prefix:]),
            None if kept is None else kept[:, prefix:],
        )
        heads = heads + self._convolved(unit[:, :, prefix:], value[:, :, prefix:], (height, width))
        heads = torch.cat((local[:, :, :prefix], heads), dim=2) if prefix else heads
        return self.proj_drop(self.proj(merge_heads(gated(heads, routing))))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit keys and values ``(B, H, N, D)`` of tokens ``(B, N, C)``, pooled ones too."""
        key, value = (split_heads(part, self.num_heads) for part in self.kv(x).chunk(2, dim=-1))
        return normalize(key, dim=-1), value

    def visible(self, grid: Sequence[int], pooled: int) -> Tensor:
        """Return how many keys each token sees, ``(R + N,)``: all tokens, or prefix, window and pooled ones."""
        reach, places = self.window_size // 2, (torch.arange(side) for side in grid)
        rows, columns = (
            (place + reach).clamp_max(len(place) - 1) - (place - reach).clamp_min(0) + 1 for place in places
        )
        patches = (rows[:, None] * columns).flatten() + pooled + self.num_prefix_tokens
        return pad(patches, (self.num_prefix_tokens, 0), value=len(patches) + self.num_prefix_tokens)

    def _attend_window(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of the window's part of the softmax."""
        sides, prefix = tuple(max(side, self.window_size) for side in grid), self.num_prefix_tokens
        outside = None
        if sides != grid:  # a map smaller than the window: widened, and what is added is not seen
            inside = pad_grid(torch.ones(1, math.prod(grid), 1, device=query.device), grid, sides).view(-1)
            outside = pad(torch.zeros_like(inside).masked_fill(inside == 0, -torch.inf), (prefix, 0))
            parts = (query, key, value)
            query, key, value = (_each_head(part, lambda p: pad_grid(p, grid, sides, prefix)) for part in parts)
        table = self.relative_pos_bias_local.unflatten(1, (self.window_size, self.window_size))
        output, statistics = attend(
            query,
            key,
            value,
            pattern=Neighborhood(sides, self.window_size, border="mask", prefix=prefix),
            bias=RelativeBias(table),
            scale=1.0,
            key_logits=outside,
            statistics=StatisticsRequest(lse=True),
        )
        assert statistics.lse is not None
        lse = statistics.lse[..., None]
        output, lse = (_each_head(part, lambda p: crop_grid(p, sides, grid, prefix)) for part in (output, lse))
        return output, lse[..., 0]

    def _convolved(self, unit: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return ``sum_j (q . T_j + b_j) v_j`` over the window, ``(B, H, N, D)``; values outside are zero."""
        reach = self.window_size // 2
        weights = (unit @ self.learnable_tokens + self.learnable_bias).unflatten(2, grid)
        padded = pad(value.unflatten(2, grid), (0, 0, reach, reach, reach, reach))
        shifted = padded.unfold(2, grid[0], 1).unfold(3, grid[1], 1)  # (B, H, w, w, D, H', W'), a view
        total = torch.zeros_like(value).unflatten(2, grid)
        for place in range(self.window_size**2):
            neighbor = shifted[:, :, place // self.window_size, place % self.window_size].movedim(2, -1)
            total = torch.addcmul(total, weights[..., place, None], neighbor)
        return total.flatten(2, 3)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image with all heads: projections, routers, bias, attention, window maps."""
        patches, pooled, prefix = math.prod(grid), PooledGrid((grid[0], grid[1]), self.sr_ratio), self.num_prefix_tokens
        tokens, coarse, places = patches + prefix, math.prod(pooled.sides), self.window_size**2
        projections = (4 * tokens + patches + 2 * coarse) * self.dim**2
        pairs = patches * (2 * coarse + 3 * places) + 2 * prefix * (patches + tokens)
        bias = self.bias_macs(*(len(offset) for offset in pooled.offsets()))
        return projections + pairs * self.dim + bias + self.router.macs(tokens)


def _each_head(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``change`` of each head of x ``(B, H, N, D)``."""
    return change(x.flatten(0, 1)).unflatten(0, x.shape[:2])
