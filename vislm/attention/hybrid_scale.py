"""Hybrid-scale attention: half the heads on coarse global keys, half in local windows; yields significance (SG-Former).

Source: "SG-Former: Self-guided Transformer with Evolving Token Reallocation" (arXiv 2308.12216);
https://github.com/OliverRensu/SG-Former.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, pad

from vislm.attention.lepe import LocallyEnhanced
from vislm.attention.tokens import merge_heads, split_heads, to_map, to_tokens
from vislm.errors import UsageError
from vislm.kernels import Dense, Pattern, StatisticsRequest, Window, attend, attention_statistics


class HybridScaleAttention(LocallyEnhanced):
    """``proj([softmax(scale q1 k1^T) v1 | softmax(scale q2 k2^T, in the window) v2] + lepe)``.

    The first half of the heads attends to ``gelu(norm(sr x))``, the map reduced by a convolution of ``sr_ratio``; what
    is left over at the lower and right border when ``sr_ratio`` does not divide a side is dropped, as published, and a
    map smaller than that is padded with zeros. The second half attends inside windows; those at the lower and right
    border are cut where the grid ends.

    Args:
        dim: width C.
        num_heads: H, even; ``head_dim = C / H``.
        sr_ratio: stride and size of the reducing convolution.
        window_size: side of the local windows.
        qkv_bias: bias of the projections.
        qk_scale: factor of the dot products, None = ``head_dim ** -0.5``.
        proj_drop: dropout behind the output projection.
        num_prefix_tokens: class and register tokens in front: keys of every head, attending to every token of the
            window heads and every reduced token of the others.

    The state dict has the official names: ``sr, norm, q1, kv1, q2, kv2`` (rows ``[k | v]``), ``lepe_linear, lepe_conv,
    proj``.

    Raises:
        UsageError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 8,
        *,
        window_size: int = 7,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__(dim, num_heads, num_prefix_tokens, qk_scale, proj_drop)
        if num_heads % 2 or sr_ratio < 1 or window_size < 1:
            raise UsageError(
                f"{num_heads=}, {sr_ratio=}, {window_size=}; expected an even number of heads, half of them for each "
                "scale, and sizes of 1 or more"
            )
        self.sr_ratio, self.window_size = sr_ratio, window_size
        self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
        self.norm = nn.LayerNorm(dim)
        self.q1, self.q2 = (nn.Linear(dim, dim // 2, bias=qkv_bias) for _ in range(2))
        self.kv1, self.kv2 = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(2))

    @overload
    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, grid: Sequence[int], *, significance: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, grid: Sequence[int], *, significance: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return the output ``(B, N, C)``; with ``significance`` also that of the grid's tokens, ``(B, H W)``.

        The significance is the attention that a token receives, averaged over heads and queries, as a global key (of
        the reduced token nearest to it) plus as a local key. It is float32 and carries no gradient.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            grid: ``(H, W)``.
            significance: return it too, for :class:`vislm.attention.SelfGuidedAttention`.
        """
        grid = self.checked(x, grid)
        scales = self.scales(x, grid)
        attended = [attend(q, k, v, pattern=pattern, scale=self.scale) for q, k, v, pattern in scales]
        output = self.joined(x, merge_heads(torch.cat(attended, dim=1)), grid)
        return (output, self._significance(scales, grid)) if significance else output

    @torch.no_grad()
    def _significance(self, scales: Sequence[Scale], grid: tuple[int, int]) -> Tensor:
        coarse, local = (_received(scale, self.scale, self.num_prefix_tokens) for scale in scales)
        reduced = (self._reduced(grid[0]), self._reduced(grid[1]))
        nearest = interpolate((coarse / math.prod(grid)).unflatten(1, (1, *reduced)), grid, mode="nearest")
        return nearest.flatten(1) + local / self._queries_in_window(grid).to(local)

    def scales(self, x: Tensor, grid: tuple[int, int]) -> tuple[Scale, Scale]:
        """Return what attends for x ``(B, N, C)``: the heads with coarse keys, and those with local ones."""
        prefix, patches = x[:, : self.num_prefix_tokens], to_map(x[:, self.num_prefix_tokens :], grid)
        below, right = (max(0, self.sr_ratio - side) for side in grid)
        reduced = gelu(self.norm(to_tokens(self.sr(pad(patches, (0, right, 0, below))))))
        window = Window(grid, tuple(min(self.window_size, side) for side in grid), prefix=self.num_prefix_tokens)
        half = self.num_heads // 2

        def scale(queries: Tensor, keys_values: Tensor, pattern: Pattern) -> Scale:
            query, key, value = (split_heads(part, half) for part in (queries, *keys_values.chunk(2, dim=-1)))
            return Scale(query, key, value, pattern)

        coarse = self.kv1(torch.cat((prefix, reduced), dim=1))
        return scale(self.q1(x), coarse, Dense()), scale(self.q2(x), self.kv2(x), window)

    def _reduced(self, side: int) -> int:
        return max(side, self.sr_ratio) // self.sr_ratio

    def _queries_in_window(self, grid: tuple[int, int]) -> Tensor:
        """Return how many queries of the grid see each key, ``(H W,)``: fewer in windows that the border cuts."""
        starts = (torch.arange(side) // self.window_size * self.window_size for side in grid)
        rows, columns = ((len(start) - start).clamp_max(self.window_size) for start in starts)
        return (rows[:, None] * columns).flatten()

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: convolutions, projections and the products of both attentions."""
        prefix, patches = self.num_prefix_tokens, math.prod(grid)
        reduced = math.prod(self._reduced(side) for side in grid)
        window = math.prod(min(self.window_size, side) for side in grid)
        convolution = reduced * self.sr_ratio**2 * self.dim**2
        projections = (2 * (patches + prefix) + reduced + prefix) * self.dim**2
        coarse = (patches + prefix) * (reduced + prefix)
        local = patches * (window + prefix) + prefix * (patches + prefix)
        return self.outer_macs(grid) + convolution + projections + (coarse + local) * self.dim


class Scale(NamedTuple):
    """Query, key and value of half the heads, ``(B, H / 2, N, D)``, and who sees whom."""

    query: Tensor
    key: Tensor
    value: Tensor
    pattern: Pattern


def _received(scale: Scale, factor: float, num_prefix: int) -> Tensor:
    """Return the attention that each key behind the prefix receives from the grid's queries, averaged over heads."""
    from_grid = torch.arange(num_prefix, scale.query.shape[2])
    request = StatisticsRequest(received=from_grid if num_prefix else True)
    statistics = attention_statistics(scale.query, scale.key, request=request, pattern=scale.pattern, scale=factor)
    assert statistics.received is not None
    return statistics.received[:, :, num_prefix:].mean(dim=1)
