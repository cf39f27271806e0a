"""Strength by distance against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vislm.analysis import rows
from vislm.analysis.distance import head_profile, mean_profile, uniform_hops
from vislm.errors import UsageError


def brute_force(attention: torch.Tensor, grid: tuple[int, int], prefix: int) -> dict[str, torch.Tensor]:
    """All measures by loops over pairs, float64; attention (B, H, T, T)."""
    height, width = grid
    batch, heads = attention.shape[:2]
    hops = torch.zeros(heads, max(grid), dtype=torch.float64)
    distance, entropy, outside = (torch.zeros(heads, dtype=torch.float64) for _ in range(3))
    for b in range(batch):
        for h in range(heads):
            for q in range(height * width):
                row = attention[b, h, prefix + q].double()
                outside[h] += row[:prefix].sum()
                share = row[prefix:] / row[prefix:].sum()
                for k in range(height * width):
                    dy, dx = abs(q // width - k // width), abs(q % width - k % width)
                    hops[h, max(dy, dx)] += row[prefix + k]
                    distance[h] += share[k] * math.hypot(dy, dx)
                    entropy[h] -= share[k] * share[k].log()
    count = batch * height * width
    found = {"hop_strength": hops, "mean_distance": distance, "patch_entropy": entropy, "prefix_mass": outside}
    return {name: value / count for name, value in found.items()}


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    prefix=st.integers(0, 3),
    batch=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_profile_is_what_loops_over_pairs_give(grid, prefix, batch, seed) -> None:
    tokens = prefix + grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)
    attention = (2 * torch.randn(batch, 2, tokens, tokens, generator=generator)).softmax(-1)
    found = head_profile(attention, grid, prefix)
    for name, expected in brute_force(attention, grid, prefix).items():
        torch.testing.assert_close(getattr(found, name).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.column_max, attention.mean((0, 2)).amax(-1))
    assert torch.allclose(found.offsets.sum((1, 2)) + found.prefix_mass, torch.ones(2), atol=1e-5)


def test_pieces_of_rows_give_the_same(monkeypatch) -> None:
    attention = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0)).softmax(-1)
    whole = head_profile(attention, (3, 4), 2)
    monkeypatch.setattr(rows, "PIECE", 1)
    for name, value in vars(head_profile(attention, (3, 4), 2)).items():
        torch.testing.assert_close(value, getattr(whole, name))


def test_uniform_attention_is_its_own_baseline() -> None:
    found = head_profile(torch.full((1, 1, 31, 31), 1 / 31), (5, 6), 1)
    torch.testing.assert_close(found.hop_strength[0], uniform_hops((5, 6), 1))
    assert found.patch_entropy.item() == pytest.approx(math.log(30), abs=1e-5)
    torch.testing.assert_close(found.pattern(), torch.full((1, 9, 11), 1 / 31))


def test_rows_that_see_no_patch_count_as_nothing() -> None:
    attention = torch.zeros(1, 1, 5, 5)
    attention[..., 0] = 1.0
    found = head_profile(attention, (2, 2), 1)
    assert found.mean_distance.item() == found.patch_entropy.item() == 0.0
    assert found.prefix_mass.item() == 1.0


def test_mean_of_images_is_that_of_their_batch() -> None:
    attention = torch.randn(3, 2, 7, 7, generator=torch.Generator().manual_seed(3)).softmax(-1)
    together = head_profile(attention, (2, 3), 1)
    apart = mean_profile([(2, head_profile(attention[:2], (2, 3), 1)), (1, head_profile(attention[2:], (2, 3), 1))])
    for name, value in vars(apart).items():
        torch.testing.assert_close(value, getattr(together, name))


def test_a_grid_that_does_not_fit() -> None:
    with pytest.raises(UsageError, match="grid of 2 x 2 patches behind 1"):
        head_profile(torch.zeros(1, 1, 6, 6), (2, 2), 1)
    with pytest.raises(UsageError, match=r"expected \(B, H, Q, K\)"):
        head_profile(torch.zeros(6, 6), (2, 3), 0)
