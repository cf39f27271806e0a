"""Density-peak clustering of tokens: merging many into few.

Source: Rodriguez and Laio, "Clustering by fast search and find of density peaks", Science 2014, with the k-nearest
density of Du et al., 2016; as used by SparseVLM (arXiv 2410.04417, github.com/Gumpest/SparseVLMs).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.choosing.ranking import top

_BLOCK = 1 << 26
"""Differences held at once while distances are computed."""


class Clusters(NamedTuple):
    """A partition of M tokens into K clusters."""

    label: Tensor
    """(M,) int64 cluster of each token."""
    center: Tensor
    """(K,) int64 the token in the middle of each cluster, most prominent first."""


def distances(tokens: Tensor) -> Tensor:
    """Return ||x - y|| / sqrt(C) (M, M) of tokens (M, C) in float32: symmetric to the bit, zero on the diagonal."""
    x = tokens.float()
    rows = max(1, _BLOCK // max(1, x.numel()))
    blocks = [torch.cdist(part, x, compute_mode="donot_use_mm_for_euclid_dist") for part in x.split(rows)]
    distance = torch.cat(blocks) / x.shape[1] ** 0.5
    return ((distance + distance.T) / 2).fill_diagonal_(0.0)


def density_peaks(tokens: Tensor, count: int, noise_seed: int | None = None) -> Clusters:
    """Cluster tokens (M, C) around the ``count`` tokens that are dense and far from denser ones.

    density_i = exp(-mean squared distance to the ``count`` nearest tokens, i included); delta_i = distance to the
    nearest denser token, or the largest distance of all for the densest; centers have the highest density delta. Every
    token joins its nearest center. Of equal densities the lower index counts as denser: two tokens that are each
    other's nearest have equal ones when ``count`` is 2.

    Args:
        tokens: M >= count of them.
        count: clusters.
        noise_seed: add 1e-6 U(0, 1) to the densities, drawn with this seed, as the official code does without one.

    Raises:
        UsageError: more clusters than tokens, or none.
    """
    if not 1 <= count <= len(tokens):
        raise UsageError(f"count={count}: cannot form so many clusters of {len(tokens)} tokens")
    distance = distances(tokens)
    nearest = distance.topk(count, dim=-1, largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    if noise_seed is not None:
        generator = torch.Generator().manual_seed(noise_seed)
        density = density + 1e-6 * torch.rand(len(density), generator=generator).to(density.device)
    order = torch.empty_like(nearest[:, 0], dtype=torch.int64)
    order[top(density, len(density))] = torch.arange(len(density), device=density.device)
    denser = order[None] < order[:, None]
    delta = distance.masked_fill(~denser, torch.inf).amin(-1)
    delta = torch.where(order == 0, distance.max(), delta)
    center = top(density * delta, count)
    label = distance[:, center].argmin(-1)
    label[center] = torch.arange(count, device=label.device)
    return Clusters(label, center)


def cluster_means(tokens: Tensor, label: Tensor, count: int) -> Tensor:
    """Return the mean (K, C) of the tokens (M, C) of each of ``count`` = K clusters, none of them empty, float32."""
    one_hot = torch.nn.functional.one_hot(label, count).T.float()
    return one_hot @ tokens.float() / one_hot.sum(-1, keepdim=True)
