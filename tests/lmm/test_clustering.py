"""Density-peak clustering against the definition written with loops."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "token_pruning"))
from by_hand import peaks

from vislm.errors import UsageError
from vislm.lmm.choosing.clustering import cluster_means, density_peaks, distances


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 14), st.integers(1, 5), st.integers(0, 1000), st.data())
def test_means_equal_the_definition(tokens, width, seed, data) -> None:
    count = data.draw(st.integers(1, tokens))
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    clusters = density_peaks(x, count)
    expected, centers = peaks(x, count)
    if count == 2:  # mutual neighbours: the loops round their equal densities differently
        return
    assert clusters.center.tolist() == centers
    torch.testing.assert_close(cluster_means(x, clusters.label, count), expected)


def test_two_clusters_are_the_same_in_every_run_and_ties_go_to_the_lower_index() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    clusters = density_peaks(x, 2)
    assert clusters.center.tolist() == [0, 2]
    assert clusters.label.tolist() == [0, 0, 1, 1]


def test_every_cluster_has_its_center() -> None:
    x = torch.zeros(6, 3)  # all tokens alike
    clusters = density_peaks(x, 4)
    assert sorted(clusters.label.unique().tolist()) == [0, 1, 2, 3]
    assert clusters.label[clusters.center].tolist() == [0, 1, 2, 3]


def test_noise_decides_ties_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator)
    assert torch.equal(density_peaks(x, 4).label, density_peaks(x, 4, noise_seed=3).label)
    pairs = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    centers = {tuple(density_peaks(pairs, 2, noise_seed=seed).center.tolist()) for seed in range(20)}
    assert len(centers) > 1


def test_distances_are_symmetric_and_scaled() -> None:
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    d = distances(x)
    assert torch.equal(d, d.T)
    assert not d.diagonal().any()
    expected = (x[:, None].double() - x[None].double()).norm(dim=-1) / 4
    torch.testing.assert_close(d.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [0, 6])
def test_impossible_counts(count) -> None:
    with pytest.raises(UsageError):
        density_peaks(torch.zeros(5, 2), count)
