"""Which patterns the heads of a ViT have: clusters of their mean attention by relative position, with names.

The question is that of Li et al. (arXiv 2303.13731); vectors, clustering and names are ours. PCA is the default because
it needs no training; an autoencoder is there for comparison.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislm.analysis.clustering import autoencoded, kmeans, pca, standardized
from vislm.analysis.distance import HeadProfile
from vislm.errors import UsageError

NAMES = ("self", "neighbour", "row", "column", "prefix", "sink", "uniform", "content")
"""Kinds of heads, in the order in which they are tried."""


def kinds(profile: HeadProfile) -> list[str]:
    """Return the kind of every head by simple tests, the first that holds.

    self: more than half of the attention on the query; neighbour: within one hop; row, column: along the query's own;
    prefix: on class and register tokens; sink: one token gets more than 0.3 from all; uniform: entropy above 0.95 of
    its largest value; content: none of these.
    """
    near = profile.hop_strength[:, :2].sum(-1)
    patches = math.prod((side + 1) // 2 for side in profile.offsets.shape[1:])
    tests = torch.stack(
        [
            profile.self_attention > 0.5,
            near > 0.5,
            profile.row_mass > 0.5,
            profile.column_mass > 0.5,
            profile.prefix_mass > 0.5,
            profile.column_max > 0.3,
            profile.patch_entropy > 0.95 * math.log(patches)
            if patches > 1
            else torch.zeros_like(near, dtype=torch.bool),
            torch.ones_like(near, dtype=torch.bool),
        ]
    )
    return [NAMES[int(holds.to(torch.int8).argmax())] for holds in tests.T]


@dataclass(frozen=True)
class Patterns:
    """Clusters of all heads of a model."""

    cluster: Tensor
    """(L, H) int64, the largest cluster 0; -1 where there is no head."""
    code: Tensor
    """(n, dims) of the n heads, layer by layer."""
    kinds: list[list[str]]
    """Per layer and head."""
    names: list[str]
    """Of each cluster: its most frequent kind, with how many of its heads have it."""


def cluster_heads(
    profiles: Sequence[HeadProfile],
    *,
    clusters: int = 8,
    dims: int = 16,
    encoder: Literal["pca", "autoencoder"] = "pca",
    seed: int = 0,
) -> Patterns:
    """Return clusters of the heads of all layers whose grid is the first layer's.

    Args:
        profiles: of every layer.
        clusters: k; fewer when there are fewer heads.
        dims: of the code.
        encoder: how vectors become codes.
        seed: of k-means and of the autoencoder.

    Raises:
        UsageError: an unknown encoder, or layers of different grids.
    """
    if encoder not in ("pca", "autoencoder"):
        raise UsageError(f"{encoder=}: expected 'pca' or 'autoencoder'")
    sizes = {p.offsets.shape[1:] for p in profiles}
    if len(sizes) != 1:
        raise UsageError(
            f"heads are compared by relative position on one grid; these layers have {len(sizes)} grids: cluster each "
            "stage alone"
        )
    vectors = torch.cat([torch.cat([p.pattern().flatten(1), p.prefix_mass[:, None]], 1) for p in profiles]).cpu()
    standard = standardized(vectors)
    code = pca(standard, dims) if encoder == "pca" else autoencoded(standard, dims, seed=seed)
    label = kmeans(code, min(clusters, len(code)), seed=seed)
    counts = [len(p.mean_distance) for p in profiles]
    table = torch.full((len(profiles), max(counts)), -1, dtype=torch.long)
    for layer, part in enumerate(label.split(counts)):
        table[layer, : len(part)] = part
    by_layer = [kinds(p) for p in profiles]
    flat = [kind for layer in by_layer for kind in layer]
    names = []
    for number in range(int(label.max()) + 1):
        members = [kind for kind, own in zip(flat, label.tolist(), strict=True) if own == number]
        kind, count = Counter(members).most_common(1)[0]
        names.append(f"{kind} ({count} of {len(members)})")
    return Patterns(table, code, by_layer, names)
