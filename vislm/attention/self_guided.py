"""Self-guided attention: unimportant tokens are merged hard, important ones lightly, into few keys (SG-Former).

Source: "SG-Former: Self-guided Transformer with Evolving Token Reallocation" (arXiv 2308.12216);
https://github.com/OliverRensu/SG-Former.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vislm.attention.lepe import LocallyEnhanced
from vislm.attention.tokens import merge_heads, split_heads
from vislm.errors import UsageError
from vislm.kernels import attend

RUNS = {8: ((4, 196), (2, 56), (4, 28)), 4: ((4, 49), (2, 14), (4, 7)), 2: ((2, 2), (2, 1))}
"""``sr_ratio`` -> parts of the sorted tokens, the least significant first: (one part in so many, tokens merged)."""


class SelfGuidedAttention(LocallyEnhanced):
    """``proj(softmax(scale q k^T) v + lepe)`` with keys and values of tokens merged by their significance.

    Tokens are sorted by significance, the least first, and split into parts (:data:`RUNS`); runs of ``g`` neighbours
    are merged by a linear map ``f`` of the run that all channels share. A part that its run does not divide is padded
    with zero tokens; the last part has what integer division leaves.

    Args:
        dim: width C.
        num_heads: H, even; ``head_dim = C / H``. The first half has its keys and values from ``kv1``.
        sr_ratio: 8, 4 or 2: how hard tokens are merged.
        qkv_bias: bias of the projections.
        qk_scale: factor of the dot products, None = ``head_dim ** -0.5``.
        proj_drop: dropout behind the output projection.
        num_prefix_tokens: class and register tokens in front: keys as they are, never merged.

    The state dict has the official names: ``q, kv1, kv2`` (rows ``[k | v]``), ``f1, f2, f3`` (``f1, f2`` for ratio 2),
    ``lepe_linear, lepe_conv, proj``. The official code sorts a row-major and a column-major copy of the same map for
    the two halves; both sort alike, but for ties, which here keep their row-major order.

    Raises:
        UsageError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 8,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__(dim, num_heads, num_prefix_tokens, qk_scale, proj_drop)
        if num_heads % 2 or sr_ratio not in RUNS:
            raise UsageError(f"{num_heads=}, {sr_ratio=}; expected an even number of heads and a ratio of {list(RUNS)}")
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv1, self.kv2 = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(2))
        for number, (_, length) in enumerate(RUNS[sr_ratio], start=1):
            self.add_module(f"f{number}", nn.Linear(length, 1))

    def forward(self, x: Tensor, grid: Sequence[int], significance: Tensor | None = None) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            grid: ``(H, W)``.
            significance: ``(B, H W)``, of the grid's tokens, as :class:`vislm.attention.HybridScaleAttention` gives it.

        Raises:
            UsageError: sizes that do not fit, no significance.
        """
        grid = self.checked(x, grid)
        if significance is None or significance.shape != (x.shape[0], math.prod(grid)):
            given = "None" if significance is None else f"of shape {tuple(significance.shape)}"
            raise UsageError(
                f"significance is {given}, expected (B, H W) = {(x.shape[0], math.prod(grid))}; self-guided attention "
                "stands behind a hybrid_scale one that yields it: HybridScaleAttention()(x, grid, significance=True)"
            )
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        merged = torch.cat((prefix, self.merged(patches, significance)), dim=1)
        query = split_heads(self.q(x), self.num_heads)
        halves = [self.kv1(merged).chunk(2, dim=-1), self.kv2(merged).chunk(2, dim=-1)]
        key, value = (split_heads(torch.cat(parts, dim=-1), self.num_heads) for parts in zip(*halves, strict=True))
        return self.joined(x, merge_heads(attend(query, key, value, scale=self.scale)), grid)

    def merged(self, patches: Tensor, significance: Tensor) -> Tensor:
        """Return the tokens ``(B, M, C)`` that ``patches`` ``(B, N, C)`` of significance ``(B, N)`` are merged to."""
        order = significance.argsort(dim=1, stable=True)
        ranked = patches.gather(1, order[..., None].expand_as(patches))
        merged = []
        for number, (start, end, length) in enumerate(self.parts(patches.shape[1]), start=1):
            runs = pad(ranked[:, start:end], (0, 0, 0, (start - end) % length)).unflatten(1, (-1, length))
            merged.append(self.get_submodule(f"f{number}")(runs.transpose(2, 3)).squeeze(-1))
        return torch.cat(merged, dim=1)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: merging, projections and the two products of attention."""
        patches, prefix = math.prod(grid), self.num_prefix_tokens
        parts = [(math.ceil((end - start) / length), length) for start, end, length in self.parts(patches)]
        keys = prefix + sum(runs for runs, _ in parts)
        merging = sum(runs * length for runs, length in parts) * self.dim
        projections = (patches + prefix + 2 * keys) * self.dim**2
        return self.outer_macs(grid) + merging + projections + 2 * (patches + prefix) * keys * self.dim

    def parts(self, tokens: int) -> list[tuple[int, int, int]]:
        """Return start, end and run length of each part of the sorted tokens."""
        parts, start = [], 0
        for number, (share, length) in enumerate(RUNS[self.sr_ratio], start=1):
            end = tokens if number == len(RUNS[self.sr_ratio]) else start + tokens // share
            parts.append((start, end, length))
            start = end
        return parts
