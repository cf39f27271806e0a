"""Bipartite soft matching: which tokens are merged into which, by the similarity of their keys.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461;
https://github.com/facebookresearch/ToMe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from vislm.errors import UnknownName, UsageError
from vislm.kernels.tokens import Merged, gather_tokens, merge_tokens

REDUCTIONS = ("mean", "sum", "amax")
_MAX_SCORES = 1 << 24
"""Similarities that are held at a time."""


@dataclass(frozen=True)
class Matching:
    """Where each of N tokens goes, n of them left.

    Attributes:
        index: ``(B, N)`` int64, the place in ``[0, n)`` of the token that each token becomes part of.
        kept: ``(B, n)`` int64, the place in ``[0, N)`` of the token that the others of its group were merged into:
            where a merged token is at home.
    """

    index: Tensor
    kept: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that are left, n."""
        return self.kept.shape[1]

    def merge(
        self, tokens: Tensor, sizes: Tensor | None = None, *, reduce: Literal["mean", "sum", "amax"] = "mean"
    ) -> Merged:
        """Return the merged tokens ``(B, n, C)`` and how many original tokens each stands for, ``(B, n)``.

        Args:
            tokens: ``(B, N, C)``.
            sizes: ``(B, N)`` floating, None = one each; the mean and the sum are weighted by them.
            reduce: size-weighted mean or sum, or the maximum.

        Raises:
            UsageError: shapes that do not fit.
            UnknownName: an unknown reduction.
        """
        if reduce not in REDUCTIONS:
            raise UnknownName("reduction", str(reduce), REDUCTIONS)
        if reduce != "amax":
            return merge_tokens(tokens, self.index, self.num_tokens, sizes, reduce=reduce)
        merged_sizes = merge_tokens(tokens[..., :1], self.index, self.num_tokens, sizes).sizes
        index = self.index[..., None].expand_as(tokens)
        empty = tokens.new_zeros(len(tokens), self.num_tokens, tokens.shape[2])
        return Merged(empty.scatter_reduce(1, index, tokens, "amax", include_self=False), merged_sizes)

    def unmerge(self, tokens: Tensor) -> Tensor:
        """Return ``(B, N, C)``: every token gets what the merged token ``(B, n, C)`` that it went into holds."""
        return gather_tokens(tokens, self.index)

    def source(self) -> Tensor:
        """Return ToMe's source matrix ``(B, n, N)`` in float32: 1 where a token is part of a merged token."""
        return source_matrix(self.index, self.num_tokens)


def source_matrix(index: Tensor, num_tokens: int) -> Tensor:
    """Return ``(B, num_tokens, N)`` in float32: 1 where a token of ``index`` ``(B, N)`` is part of a merged token."""
    return one_hot(index, num_tokens).transpose(1, 2).float()


def bipartite_soft_matching(
    metric: Tensor, r: int, *, class_token: bool = False, distill_token: bool = False, registers: int = 0
) -> Matching:
    """Return the matching that merges the ``r`` tokens most similar to one of the other half.

    Tokens at even places are A, those at odd places B. Every token of A finds its most similar token of B; the r best
    pairs are merged, at most half of the tokens that may be. Similarity is the cosine, in float32; ties go to the lower
    place. Nothing here is differentiable.

    Protected tokens (the first, the second, and ``registers`` behind them) are never merged. The order of what is left:
    protected tokens as they stood (if there are two or more), the rest of A, then of B. What is left of A stands in its
    old order if the first token or registers are protected, otherwise from the most to the least similar.

    Args:
        metric: ``(B, N, D)``; in ToMe the keys' mean over heads.
        r: tokens to remove; 0 or less removes none.
        class_token: protect the first token.
        distill_token: protect the second token.
        registers: further protected tokens behind those.

    Raises:
        UsageError: a metric of another shape, negative ``registers``.
    """
    if metric.ndim != 3 or not metric.is_floating_point():
        raise UsageError(f"metric is {metric.dtype} {tuple(metric.shape)}, expected floating-point (B, N, D)")
    if registers < 0:
        raise UsageError(f"{registers=}, expected 0 or more protected tokens")
    batch, tokens = metric.shape[:2]
    leading = (2 if distill_token else int(class_token)) + registers
    first_is_free = distill_token and not class_token
    last_of_second = tokens - 1 - tokens % 2
    r = min(r, (tokens - leading + first_is_free) // 2) if last_of_second >= leading else 0
    if r <= 0:
        everyone = torch.arange(tokens, device=metric.device).expand(batch, tokens)
        return Matching(everyone, everyone)
    protected = torch.arange(tokens, device=metric.device) < leading
    protected[:1] &= not first_is_free
    best, partner = _best_pairs(metric, protected)
    ranked = best.argsort(dim=1, descending=True, stable=True)
    merged, left = ranked[:, :r], ranked[:, r:]
    if class_token or registers:
        left = left.sort(dim=1).values
    kept = _ordered(left * 2, torch.arange(1, tokens, 2, device=metric.device).expand(batch, -1), leading)
    index = torch.empty(batch, tokens, dtype=torch.int64, device=metric.device)
    index.scatter_(1, kept, torch.arange(kept.shape[1], device=metric.device).expand(batch, -1))
    index.scatter_(1, merged * 2, index.gather(1, partner.gather(1, merged) * 2 + 1))
    return Matching(index, kept)


def _best_pairs(metric: Tensor, protected: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every token of A its best similarity and the number in B of its partner, both ``(B, ceil(N / 2))``."""
    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        unit = normalize(metric.float(), dim=-1)
        first, second = unit[:, ::2], unit[:, 1::2].transpose(1, 2)
        rows = max(1, _MAX_SCORES // max(1, len(metric) * second.shape[2]))
        best, partner = [], []
        for start in range(0, first.shape[1], rows):
            scores = (first[:, start : start + rows] @ second).masked_fill_(protected[1::2], -torch.inf)
            top = scores.max(dim=-1)
            best.append(top.values)
            partner.append(top.indices)
        return torch.cat(best, 1).masked_fill_(protected[::2], -torch.inf), torch.cat(partner, 1)


def _ordered(first: Tensor, second: Tensor, leading: int) -> Tensor:
    """Return the places that stay, in order: ``leading`` ones taken in turn from A and B, then A's, then B's."""
    of_first, of_second = (leading + 1) // 2, leading // 2
    if not of_second:
        return torch.cat((first, second), dim=1)
    lead = torch.cat((first[:, :of_first], second[:, :of_second]), dim=1)
    turns = torch.arange(leading, device=first.device)
    lead = lead[:, turns // 2 + (turns % 2) * of_first]
    return torch.cat((lead, first[:, of_first:], second[:, of_second:]), dim=1)
