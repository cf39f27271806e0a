"""k nearest neighbours by cosine similarity, weighted as in DINO's and DINOv2's evaluation.

Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018; Caron et al.
(DINO), ICCV 2021, arXiv 2104.14294; Oquab et al. (DINOv2), arXiv 2304.07193, github.com/facebookresearch/dinov2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHUNK = 1 << 16
"""Training features that are compared at once, so that memory does not grow with their number."""


def nearest(queries: Tensor, bank: Tensor, k: int, *, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Return similarities and places ``(Q, k)`` of the nearest features, nearest first.

    Args:
        queries: ``(Q, D)``, normalised.
        bank: ``(N, D)``, normalised, of any floating dtype, N >= k.
        k: how many.
        chunk: features that are compared at once; nothing but memory depends on it.
    """
    best = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), chunk):
        part = bank[start : start + chunk].to(queries.dtype)
        values, found = (queries @ part.T).topk(min(k, len(part)), dim=-1)
        best, places = torch.cat([best, values], dim=-1), torch.cat([places, found + start], dim=-1)
        best, order = best.topk(min(k, best.shape[-1]), dim=-1)
        places = places.gather(-1, order)
    return best, places


def vote(
    similarities: Tensor, labels: Tensor, classes: int, ks: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """Return k -> what the classes get of the first k neighbours' weights, ``(Q, C)``.

    Weights are softmax(similarity / T) over all K neighbours, so that only for k = K they sum to 1.

    Args:
        similarities: ``(Q, K)``, nearest first.
        labels: ``(Q, K)``, the neighbours' classes.
        classes: C.
        ks: numbers of neighbours, each at most K.
        temperature: T; 0.07 in the papers.
    """
    weights = (similarities / temperature).softmax(-1)
    votes = weights.new_zeros(len(weights), classes)
    return {k: votes.scatter_add(-1, labels[:, :k], weights[:, :k]) for k in ks}


def knn_votes(
    queries: Tensor, bank: Tensor, labels: Tensor, classes: int, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, Tensor]:
    """Return k -> votes ``(Q, C)`` of a classification by the nearest of N labelled features.

    Args:
        queries: ``(Q, D)``; normalised here.
        bank: ``(N, D)``, normalised.
        labels: ``(N,)``, the class of each.
        classes: C.
        ks: numbers of neighbours, each at most N.
        temperature: T.
    """
    queries = nn.functional.normalize(queries, dim=-1)
    similarities, places = nearest(queries, bank, max(ks))
    return vote(similarities, labels[places], classes, ks, temperature)
