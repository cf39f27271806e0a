"""VFlowOpt's equations, without any model."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vislm import registry
from vislm.errors import UsageError
from vislm.lmm.adapters.llava import Grid
from vislm.lmm.decoder.attention import AttentionCall
from vislm.token_pruning.vflowopt import VFlowOpt
from vislm.token_pruning.vflowopt import map as maps
from vislm.token_pruning.vflowopt.recycling import cell_numbers, keep_highest, recycle, stage_counts
from vislm.token_pruning.vflowopt.schedule import Retention, solve_retention, stage_lengths

CONFIGS = Path(__file__).parents[2] / "configs" / "token_pruning" / "vflowopt"
RELEASED = {"50": 0.5008, "25": 0.2507, "10": 0.1000}


def call(seed: int = 0, prefix: int = 0, crops: int = 2, patches: int = 12, masked: bool = False) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (2.0 * torch.randn(crops, 3, prefix + patches, 8, generator=generator) for _ in range(3))
    mask = torch.zeros(1, 1, 1, 1).expand(crops, 1, prefix + patches, prefix + patches) if masked else None
    return AttentionCall(q, k, v, mask, False, 8**-0.5)


def explicit(attention: AttentionCall, t: float, prefix: int) -> torch.Tensor:
    """m from the whole matrix, row by row as the equations read."""
    matrix = torch.softmax(attention.query @ attention.key.transpose(-1, -2) * attention.scale, -1)
    mean = matrix.mean(1)[:, prefix:, prefix:]
    received = mean.mean(1)
    maps_ = []
    for rows, r in zip(mean, received, strict=True):
        anchors = [j for j in range(len(r)) if r[j] > t * r.mean()]
        maps_.append(rows[anchors].mean(0))
    return torch.stack(maps_)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.9, 1.3])
def test_context_is_that_of_the_whole_matrix(prefix, masked, t) -> None:
    attention = call(prefix=prefix, masked=masked)
    ours = maps.context(attention, t, prefix, "strongest")
    torch.testing.assert_close(ours, explicit(attention, t, prefix), atol=1e-6, rtol=1e-5)


def test_without_anchors_the_strongest_patch_is_one_and_that_is_said() -> None:
    attention = call()
    received = torch.softmax(attention.query @ attention.key.transpose(-1, -2) * attention.scale, -1).mean((1, 2))
    with pytest.warns(UserWarning, match="its strongest one is the only anchor"):
        mean = maps.context(attention, 100.0, 0, "strongest")
    rows = attention.rows(received.argmax(-1, keepdim=True)).mean(1)[:, 0]
    torch.testing.assert_close(mean, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert maps.context(attention, 100.0, 0, "nan").isnan().all()


def test_half_precision_gives_finite_float32() -> None:
    attention = call()
    half = AttentionCall(*(x.bfloat16() for x in (attention.query, attention.key, attention.value)), None, False, 0.35)
    mean = maps.context(half, 1.0, 0, "strongest")
    assert mean.dtype == torch.float32
    assert mean.isfinite().all()


@pytest.mark.parametrize(("name", "tower"), [("auto", "clip_vision_model"), ("auto", "siglip_vision_model")])
def test_normalised_pixels_become_the_picture_again(name, tower) -> None:
    colours = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    mean, std = maps._STATISTICS["clip" if "clip" in tower else "siglip"]
    pixels = (colours / 255.0 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    levels = maps.grey_levels(pixels, name, tower)
    assert torch.equal(levels, (colours.sum(1) / 3.0).round().long())


def test_the_official_arithmetic_wraps_around() -> None:
    pixels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert maps.grey_levels(pixels, "wrapped", "siglip_vision_model").flatten().tolist() == [1, 129, 0, 127, 255]


def test_unknown_towers_must_be_told() -> None:
    with pytest.raises(UsageError, match="give pixels= one of"):
        maps.grey_levels(torch.zeros(1, 3, 4, 4), "auto", "martian_vision_model")


def test_entropy_of_known_patches() -> None:
    flat, halves = torch.full((4, 4), 7), torch.tensor([[0, 0, 255, 255]] * 4)
    every = torch.arange(16).view(4, 4)
    levels = torch.cat([torch.cat([flat, halves, every], 1), torch.zeros(3, 12, dtype=torch.long)])  # a rest below
    entropy = maps.patch_entropy(levels.unsqueeze(0), 4)
    torch.testing.assert_close(entropy, torch.tensor([[0.0, 1.0, 4.0]]), atol=1e-6, rtol=0.0)


def test_the_entropy_term_sums_to_alpha_in_every_crop() -> None:
    mean, entropy = torch.zeros(3, 9), torch.rand(3, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(maps.importance(mean, entropy, -0.4).sum(-1), torch.full((3,), -0.4))
    assert maps.importance(mean, None, 0.0) is mean


def test_a_newline_is_one_more_column_and_views_do_not_share_cells() -> None:
    base, tiles = Grid(4, 4, 0, 4), Grid(3, 5, 16, 6)
    cells = cell_numbers([base, tiles], 16 + 18 + 1, a=2.0)
    first, second = cells[:16].view(4, 4), cells[16:34].view(3, 6)
    assert len(first.unique()) == 4
    assert len(second.unique()) == 6  # three columns of cells: the newlines fall into the last one
    assert second[0, 4] == second[1, 5] != second[2, 5]
    assert not set(first.unique().tolist()) & set(second.unique().tolist())
    assert cells[-1] == -1


@given(
    st.integers(2, 6), st.integers(2, 7), st.floats(1.0, 5.0), st.floats(0.05, 1.0), st.integers(0, 99), st.booleans()
)
def test_recycling_keeps_what_the_formula_says(height, width, a, r1, seed, negative) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = height * width
    score = torch.rand(count, generator=generator) - (0.7 if negative else 0.0)
    tokens = torch.randn(count, 3, generator=generator)
    cells = cell_numbers([Grid(height, width, 0, width)], count, a)
    drop, recycled = stage_counts(count, count, r1, a)
    chosen = recycle(tokens, score, cells, drop, recycled)
    low = score.argsort()[: min(drop + recycled, count - 1)]
    occupied = len(cells[low].unique()) if recycled else 0
    assert int(chosen.keep.sum()) == max(1, count - drop - recycled) + occupied
    if chosen.source is None:
        return
    assert chosen.features is not None
    assert chosen.size is not None
    assert chosen.features.isfinite().all()
    assert chosen.size.sum() == count  # every token went somewhere
    seats = chosen.keep.nonzero().flatten()
    for seat, feature, size in zip(seats.tolist(), chosen.features, chosen.size, strict=True):
        members = (chosen.source == chosen.source[seat]).nonzero().flatten()
        assert len(members) == size
        weight = score[members].clamp(min=1e-8).unsqueeze(1)
        torch.testing.assert_close(feature, (tokens[members] * weight).sum(0) / weight.sum(), atol=1e-4, rtol=1e-4)
        assert score[seat] == score[members].max()
        assert len(cells[members].unique()) == 1


def test_of_equal_tokens_the_earlier_ones_stay() -> None:
    tokens, score = torch.randn(6, 2), torch.ones(6)
    chosen = recycle(tokens, score, torch.full((6,), -1), 4, 0)
    assert chosen.keep.tolist() == [True, True, False, False, False, False]
    assert keep_highest(score, 0.5).tolist() == [0, 1, 2]
    merged = recycle(tokens, score, torch.zeros(6, dtype=torch.long), 2, 2)
    assert merged.keep.tolist() == [True, True, True, False, False, False]  # the cell's token sits in its first seat


def test_one_token_always_stays() -> None:
    assert len(keep_highest(torch.rand(3), 0.01)) == 1
    assert int(recycle(torch.rand(3, 2), torch.rand(3), torch.full((3,), -1), 3, 0).keep.sum()) == 1


@pytest.mark.parametrize("budget", RELEASED)
def test_released_options_have_their_average(budget) -> None:
    method = registry.build("pruning", str(CONFIGS / f"llava-onevision-7b-{budget}.yaml"))
    assert isinstance(method, VFlowOpt)
    retention = method.retention(729, (9, 9, 10))
    assert retention == (method.R1, method.R2, method.R3)
    assert retention.average((9, 9, 10)) == pytest.approx(RELEASED[budget], abs=5e-5)


@given(st.floats(0.02, 1.0), st.sampled_from([4, 5, 24, 28, 32]))
def test_solved_ratios_have_the_average_that_was_asked_for(average, depth) -> None:
    third = depth // 3
    lengths = (third, third, depth - 2 * third)
    retention = solve_retention(average, lengths)
    assert all(0.0 < r <= 1.0 for r in retention)
    assert retention.average(lengths) == pytest.approx(average, abs=1e-9)


def test_stages_are_where_the_paper_has_them() -> None:
    assert stage_lengths(None, 28) == (9, 9, 10)
    assert stage_lengths(None, 32) == (10, 10, 12)
    assert stage_lengths((2, 5), 8) == (2, 3, 3)


def test_given_ratios_stay_and_what_they_exceed_is_refused() -> None:
    assert solve_retention(0.25, (9, 9, 10), r1=0.3, r2=0.9) == Retention(0.3, 0.9, pytest.approx(0.69259, abs=1e-4))
    assert solve_retention(0.25, (9, 9, 10), r1=0.25, r2=0.5).r3 == 1.0  # all that is left does not reach the average
    with pytest.raises(UsageError, match="R3 would be -"):
        solve_retention(0.25, (9, 9, 10), r1=0.9)


def test_a_number_of_tokens_is_an_average_per_image() -> None:
    assert VFlowOpt(keep=64).retention(256, (9, 9, 10)) == VFlowOpt(keep=0.25).retention(1, (9, 9, 10))
    assert VFlowOpt(keep=64).retention(50, (9, 9, 10)) == (1.0, 1.0, 1.0)
