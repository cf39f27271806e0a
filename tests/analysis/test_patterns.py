"""Clusters and kinds of heads."""

from __future__ import annotations

import pytest
import torch

from vislm.analysis.clustering import autoencoded, kmeans, pca, standardized
from vislm.analysis.distance import head_profile
from vislm.analysis.patterns import NAMES, cluster_heads, kinds
from vislm.errors import UsageError

GRID, PREFIX = (4, 5), 1
N = GRID[0] * GRID[1]


def made(kind: str) -> torch.Tensor:
    """Attention (21, 21) of one head of that kind."""
    place = torch.arange(N)
    row, column = place // GRID[1], place % GRID[1]
    patches = torch.full((N, N), 1e-3)
    near = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) == 1
    if kind == "self":
        patches[place, place] = 1.0
    elif kind == "neighbour":
        patches[near] = 1.0
    elif kind == "row":
        patches[(row[:, None] == row) & (column[:, None] != column)] = 1.0
    elif kind == "column":
        patches[(column[:, None] == column) & (row[:, None] != row)] = 1.0
    elif kind == "sink":
        patches[:, 7] = 1.0
    elif kind == "content":
        patches[place, torch.randperm(N, generator=torch.Generator().manual_seed(4))] = 1.0
    full = torch.zeros(N + 1, N + 1)
    full[1:, 1:] = patches
    full[:, 0] = 100.0 if kind == "prefix" else 1e-3
    full[0] = 1.0
    return full / full.sum(-1, keepdim=True)


def test_every_kind_is_recognised() -> None:
    heads = torch.stack([made(kind) for kind in NAMES])[None]
    assert kinds(head_profile(heads, GRID, PREFIX)) == list(NAMES)


def test_copies_of_a_head_are_one_cluster() -> None:
    chosen = ("self", "row", "prefix")
    generator = torch.Generator().manual_seed(0)

    def noisy(kind: str) -> torch.Tensor:
        attention = made(kind) * (1 + 0.1 * torch.rand(N + 1, N + 1, generator=generator))
        return attention / attention.sum(-1, keepdim=True)

    layers = [torch.stack([noisy(kind) for kind in chosen])[None] for _ in range(4)]
    profiles = [head_profile(layer, GRID, PREFIX) for layer in layers]
    found = cluster_heads(profiles, clusters=3)
    assert found.cluster.shape == (4, 3)
    assert (found.cluster == found.cluster[0]).all()
    assert len(set(found.cluster[0].tolist())) == 3
    assert sorted(found.names) == ["prefix (4 of 4)", "row (4 of 4)", "self (4 of 4)"]
    again = cluster_heads(profiles, clusters=3)
    assert torch.equal(found.cluster, again.cluster)
    assert torch.equal(found.code, again.code)
    coded = cluster_heads(profiles, clusters=3, dims=4, encoder="autoencoder")
    assert coded.code.shape == (12, 4)
    assert torch.equal(coded.code, cluster_heads(profiles, clusters=3, dims=4, encoder="autoencoder").code)


def test_kmeans_finds_blobs_whatever_their_order() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    truth = torch.tensor([0] * 9 + [1] * 6 + [2] * 3)
    points = centres[truth] + 0.3 * torch.randn(18, 2, generator=generator)
    assert torch.equal(kmeans(points, 3), truth)  # numbered by size
    order = torch.randperm(18, generator=generator)
    assert torch.equal(kmeans(points[order], 3), truth[order])
    assert kmeans(torch.zeros(4, 2), 3).tolist() == [0, 0, 0, 0]


def test_components_keep_distances() -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores = pca(x, 5)
    torch.testing.assert_close(torch.cdist(scores, scores), torch.cdist(x, x))
    torch.testing.assert_close(pca(x, 2), scores[:, :2])
    flat = standardized(torch.cat([x, torch.ones(7, 1)], 1))
    torch.testing.assert_close(flat.square().mean(0), torch.tensor([1.0] * 5 + [0.0], dtype=torch.float64))


def test_training_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    autoencoded(torch.rand(6, 4, generator=torch.Generator().manual_seed(0)), 2, steps=3)
    assert torch.equal(torch.rand(3), expected)


def test_bad_input() -> None:
    profile = head_profile(made("self")[None, None], GRID, PREFIX)
    with pytest.raises(UsageError, match="expected 'pca'"):
        cluster_heads([profile], encoder="umap")  # pyright: ignore[reportArgumentType]
    other = head_profile(torch.full((1, 1, 5, 5), 0.2), (2, 2), 1)
    with pytest.raises(UsageError, match="2 grids"):
        cluster_heads([profile, other])
    with pytest.raises(UsageError, match="clusters of 3"):
        kmeans(torch.zeros(3, 2), 4)
