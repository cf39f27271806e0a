"""How far patches look: attention of a ViT's head by distance on the grid of patches.

The questions are those of Li et al., "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
PacificVis 2023, arXiv 2303.13731; its formulas are not public, these are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vislm.analysis.rows import MatrixRows, RowSource, row_pieces
from vislm.errors import UsageError


@dataclass
class HeadProfile:
    """Strength by distance of H heads, means over images and patch queries; (h, w) is the grid of N patches."""

    hop_strength: Tensor
    """(H, max(h, w)): attention on patches at Chebyshev distance k (0: the query itself), not renormalised."""
    mean_distance: Tensor
    """(H,): Euclidean, in patches, weighted by the attention on patches."""
    patch_entropy: Tensor
    """(H,): nats, of the attention renormalised on patches."""
    prefix_mass: Tensor
    """(H,): attention on class and register tokens."""
    column_max: Tensor
    """(H,): the largest mean attention that one token gets from all queries, the prefix's included."""
    received: Tensor
    """(H, P + N): the mean attention that each token gets from all queries."""
    offsets: Tensor
    """(H, 2h - 1, 2w - 1): attention at a relative position (dy, dx), summed over keys; [h - 1, w - 1] is the own."""

    @property
    def self_attention(self) -> Tensor:
        """(H,): attention on the query itself."""
        return self.hop_strength[:, 0]

    @property
    def row_mass(self) -> Tensor:
        """(H,): attention on patches of the query's own row."""
        return self.offsets[:, self.offsets.shape[1] // 2].sum(-1)

    @property
    def column_mass(self) -> Tensor:
        """(H,): attention on patches of the query's own column."""
        return self.offsets[:, :, self.offsets.shape[2] // 2].sum(-1)

    def pattern(self) -> Tensor:
        """Return (H, 2h - 1, 2w - 1): the mean attention between patches at a relative position."""
        height, width = ((side + 1) // 2 for side in self.offsets.shape[1:])
        pairs = _pairs(height, width).to(self.offsets.device)
        return self.offsets * (height * width / pairs)


def head_profile(source: RowSource | Tensor, grid: tuple[int, int], prefix: int) -> HeadProfile:
    """Return the profile of every head, its rows taken a few at a time.

    Args:
        source: the attention of B images, or its matrix (B, H, P + N, P + N).
        grid: patches (h, w), as the model has them.
        prefix: P, class and register tokens in front.

    Raises:
        UsageError: a grid that does not fit the tokens.
    """
    source = MatrixRows(source) if isinstance(source, Tensor) else source
    batch, heads, queries, keys = source.shape
    height, width = grid
    patches = height * width
    if queries != prefix + patches or keys != queries:
        raise UsageError(
            f"{queries} queries and {keys} keys, but a grid of {height} x {width} patches behind {prefix} prefix tokens"
        )
    offsets = distance = entropy = outside = received = 0
    for index, rows in row_pieces(source):
        received = received + rows.sum((0, 2))
        index, rows = index[index >= prefix] - prefix, rows[:, :, index >= prefix]
        if not len(index):
            continue
        place, apart = _relative(index.to(rows.device), grid)
        on_patches = rows[..., prefix:]
        flat = on_patches.sum(0).flatten(1)
        bins = flat.new_zeros(heads, (2 * height - 1) * (2 * width - 1))
        offsets = offsets + bins.index_add_(1, place.flatten(), flat)
        total = on_patches.sum(-1)
        share = on_patches / total.clamp(min=torch.finfo(rows.dtype).tiny).unsqueeze(-1)
        distance = distance + (share * apart).sum((0, 2, 3))
        entropy = entropy - torch.xlogy(share, share).sum((0, 2, 3))
        outside = outside + rows[..., :prefix].sum((0, 2, 3))
    assert isinstance(offsets, Tensor)
    assert isinstance(distance, Tensor)
    assert isinstance(entropy, Tensor)
    assert isinstance(outside, Tensor)
    assert isinstance(received, Tensor)
    count = batch * patches
    offsets = (offsets / count).view(heads, 2 * height - 1, 2 * width - 1)
    received = received / (batch * queries)
    return HeadProfile(
        hop_strength=_by_hop(offsets),
        mean_distance=distance / count,
        patch_entropy=entropy / count,
        prefix_mass=outside / count,
        column_max=received.amax(-1),
        received=received,
        offsets=offsets,
    )


def mean_profile(profiles: list[tuple[int, HeadProfile]]) -> HeadProfile:
    """Return the mean of profiles of several batches, (images, profile) each; column maxima are of the mean."""
    total = sum(count for count, _ in profiles)
    mean = {
        f.name: torch.stack([getattr(p, f.name) * (n / total) for n, p in profiles]).sum(0) for f in fields(HeadProfile)
    }
    return HeadProfile(**{**mean, "column_max": mean["received"].amax(-1)})


def uniform_hops(grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Return (max(h, w),): the hop strength of uniform attention to all tokens.

    Patches at the border have fewer far neighbours: divide a profile by this to see what a head adds to its place.
    """
    tokens = prefix + math.prod(grid)
    return _by_hop(_pairs(*grid)[None] / (tokens * math.prod(grid)))[0]


def _relative(query: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return for queries (R,) and all patches the cell of their relative position, (R, N), and their distance."""
    height, width = grid
    key = torch.arange(height * width, device=query.device)
    down = key // width - (query // width)[:, None]
    right = key % width - (query % width)[:, None]
    return (down + height - 1) * (2 * width - 1) + right + width - 1, (down.square() + right.square()).float().sqrt()


def _pairs(height: int, width: int) -> Tensor:
    """Return (2h - 1, 2w - 1): how many pairs of patches have each relative position."""
    rows, columns = (size - torch.arange(1 - size, size).abs() for size in (height, width))
    return (rows[:, None] * columns).float()


def _by_hop(offsets: Tensor) -> Tensor:
    """Return (H, max(h, w)) of (H, 2h - 1, 2w - 1): sums over cells at the same Chebyshev distance."""
    height, width = ((side + 1) // 2 for side in offsets.shape[1:])
    down, right = (torch.arange(1 - size, size, device=offsets.device).abs() for size in (height, width))
    hop = torch.maximum(down[:, None].expand(-1, len(right)), right.expand(len(down), -1))
    return offsets.new_zeros(len(offsets), max(height, width)).index_add_(1, hop.flatten(), offsets.flatten(1))
