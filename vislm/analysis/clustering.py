"""Vectors into few dimensions and into clusters, with the same result every time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vislm.errors import UsageError

STARTS = 8
"""Seedings of k-means; the tightest result counts."""
_ROUNDS = 100


def standardized(x: Tensor) -> Tensor:
    """Return x (n, D) with every column at mean 0 and deviation 1 (columns without any at 0), float64."""
    centred = x.double() - x.double().mean(0)
    deviation = centred.square().mean(0).sqrt()
    return centred / torch.where(deviation > 1e-12, deviation, 1.0)


def pca(x: Tensor, dims: int) -> Tensor:
    """Return the first principal components (n, min(dims, n, D)) of x (n, D); the largest entry of each is positive."""
    centred = x.double() - x.double().mean(0)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    scores = (left * sizes)[:, :dims]
    largest = scores.gather(0, scores.abs().argmax(0, keepdim=True))
    return scores * torch.where(largest < 0, -1.0, 1.0)


def autoencoded(x: Tensor, dims: int, *, seed: int = 0, steps: int = 300) -> Tensor:
    """Return codes (n, dims) of an autoencoder (one hidden layer each way) trained on x (n, D) from a fixed seed."""
    with torch.random.fork_rng(devices=()), torch.enable_grad():
        torch.manual_seed(seed)
        hidden = max(dims, min(64, x.shape[1]))
        encoder = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.GELU(), nn.Linear(hidden, dims))
        decoder = nn.Sequential(nn.Linear(dims, hidden), nn.GELU(), nn.Linear(hidden, x.shape[1]))
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
        target = x.detach().float().cpu()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (decoder(encoder(target)) - target).square().mean()
            loss.backward()
            optimizer.step()
        return encoder(target).detach().double()


def kmeans(x: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """Return the cluster (n,) int64 of each row of x (n, D): Lloyd's algorithm from k-means++ seedings.

    Clusters are numbered by size, the largest 0; equal sizes by their first member.

    Raises:
        UsageError: k is no number from 1 to n.
    """
    if not 1 <= k <= len(x):
        raise UsageError(f"{k=} clusters of {len(x)} vectors: expected a number from 1 to {len(x)}")
    generator = torch.Generator().manual_seed(seed)
    points = x.double().cpu()
    best: tuple[float, Tensor] | None = None
    for _ in range(STARTS):
        centres = _seeds(points, k, generator)
        label = torch.full((len(points),), -1)
        for _ in range(_ROUNDS):
            nearest = torch.cdist(points, centres).argmin(1)
            if torch.equal(nearest, label):
                break
            label = nearest
            for number in label.unique().tolist():
                centres[number] = points[label == number].mean(0)
        spread = float((points - centres[label]).square().sum())
        if best is None or spread < best[0] - 1e-12:
            best = spread, label
    assert best is not None
    return _by_size(best[1])


def _seeds(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(chosen) < k:
        apart = torch.cdist(points, points[chosen]).square().amin(1)
        if not bool((apart > 0).any()):  # fewer different points than clusters
            chosen.append(chosen[-1])
            continue
        chosen.append(int(torch.multinomial(apart, 1, generator=generator)))
    return points[chosen].clone()


def _by_size(label: Tensor) -> Tensor:
    members = {number: (label == number).nonzero().flatten() for number in label.unique().tolist()}
    order = sorted(members, key=lambda number: (-len(members[number]), int(members[number][0])))
    renumbered = torch.empty_like(label)
    for new, old in enumerate(order):
        renumbered[members[old]] = new
    return renumbered
