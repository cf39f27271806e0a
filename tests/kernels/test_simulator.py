"""The tile model against masks that are cut into tiles by hand, and against published cases."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vislm.errors import UnknownName, UsageError
from vislm.golden.checks._tile_counts import check_tile_counts
from vislm.golden.fixtures import read_fixture
from vislm.kernels import Blocked, Neighborhood, Window
from vislm.kernels.simulator import axis_tiles, flattened_count, simulate, suggest_windows

FIXTURE = Path(__file__).parents[1] / "golden" / "neighborhood" / "tile_counts.safetensors"
FLUX, VIDEO = ((256, 256), (80, 80)), ((30, 48, 80), (18, 24, 24))


def mask_of(pattern) -> torch.Tensor:
    """Return the mask among the grid's own tokens; the queries stand at the end of the keys."""
    queries, keys = math.prod(pattern.query_grid), pattern.prefix + math.prod(pattern.grid)
    mask = pattern.mask(torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None])
    return mask[:, pattern.prefix :]


def test_fixture() -> None:
    comparisons = list(check_tile_counts(read_fixture(FIXTURE)))
    assert len(comparisons) == 6
    assert all(comparison.passed for comparison in comparisons)


def test_a_wrong_count_in_the_fixture_is_noticed(tmp_path) -> None:
    fixture = read_fixture(FIXTURE)
    counts = load_file(FIXTURE)["out.counts"]
    counts[3, 2] += 1
    save_file({"out.counts": counts}, tmp_path / "wrong.safetensors")
    fixture.outputs["counts"] = load_file(tmp_path / "wrong.safetensors")["out.counts"]
    assert [comparison.passed for comparison in check_tile_counts(fixture)] == [True, True, True, False, True, True]


@pytest.mark.parametrize(
    ("grid", "window", "query_tile", "key_tile", "stride", "flops", "bound", "free"),
    [
        (*FLUX, (16, 8), (16, 8), 1, 10.24, 7.51, False),
        (*FLUX, (16, 8), (16, 8), 16, 10.24, 10.24, True),
        (*FLUX, (16, 16), (16, 8), 1, 10.24, 7.06, False),
        (*FLUX, (16, 16), (16, 8), 16, 10.24, 10.24, True),
        (*VIDEO, (2, 8, 8), (2, 8, 8), 1, 11.11, 5.44, False),
        (*VIDEO, (2, 8, 8), (2, 8, 8), (16, 8, 8), 11.11, 11.11, True),
        (*VIDEO, (4, 8, 8), (2, 8, 8), 1, 11.11, 4.92, False),
        (*VIDEO, (4, 8, 8), (2, 8, 8), (16, 8, 8), 11.11, 10.42, True),
        (32768, 2048, 128, 128, 1, 16, 15.1, False),
        (32768, 2048, 256, 128, 1, 16, 14.3, False),
        (32768, 2048, 128, 128, 256, 16, 16, True),
        (32768, 2048, 256, 128, 2048, 16, 16, True),
    ],
)
def test_published_cases(grid, window, query_tile, key_tile, stride, flops, bound, free) -> None:
    speedup = simulate(Neighborhood(grid, window, stride=stride), query_tile, key_tile)
    digits = 1 if isinstance(grid, int) else 2
    assert round(speedup.flop_bound, 2) == flops
    assert round(speedup.static_bound, digits) == bound
    assert speedup.block_sparse is free


def test_flattened_tiles() -> None:
    pattern = Neighborhood((56, 56), 7)
    count = flattened_count(pattern, 64)
    assert (count.visited, count.dense) == (343, 2401)
    assert count.bound == 7.0
    boxes = simulate(pattern, 8)
    assert (boxes.static, boxes.dynamic) == (361, 196)


axes = st.tuples(
    st.integers(1, 13), st.integers(1, 13), st.integers(1, 5), st.integers(1, 3), st.booleans(), st.integers(1, 5)
).filter(lambda axis: axis[1] * axis[3] <= axis[0] and axis[2] <= axis[1])


@given(st.lists(axes, min_size=1, max_size=2), st.integers(1, 5))
def test_counts_are_those_of_the_mask(drawn, key_tile) -> None:
    """Cut every dilation group's mask into boxes, one pair of boxes at a time."""
    sizes, window, stride, dilation, causal, query_tile = zip(*drawn, strict=True)
    pattern = Neighborhood(sizes, window, stride=stride, dilation=dilation, causal=list(causal))
    mask = mask_of(pattern).reshape(*sizes, *sizes)
    visited = full = pairs = 0
    for group in product(*(range(step) for step in dilation)):
        members = [range(first, size, step) for first, size, step in zip(group, sizes, dilation, strict=True)]
        queries = [list(boxes(line, tile)) for line, tile in zip(members, query_tile, strict=True)]
        keys = [list(boxes(line, key_tile)) for line in members]
        for box in product(*queries, *keys):
            part = mask[torch.meshgrid(*map(torch.tensor, box), indexing="ij")]
            pairs, visited, full = pairs + 1, visited + int(part.any()), full + int(part.all())
    speedup = simulate(pattern, query_tile, key_tile)
    assert (speedup.pairs, speedup.static, speedup.full) == (pairs, visited, full)
    assert speedup.dynamic <= visited
    assert speedup.flop_bound == pytest.approx(mask.numel() / int(mask.sum()))
    if speedup.block_sparse:
        assert visited == full
        assert speedup.dynamic_block_sparse


def boxes(line, tile):
    for first in range(0, len(line), tile):
        yield list(line[first : first + tile])


@pytest.mark.parametrize(
    "pattern",
    [
        Neighborhood((5, 9), (3, 4), prefix=2),
        Neighborhood((6, 4, 5), (3, 2, 5), dilation=(2, 1, 1)),
        Neighborhood(23, 4, dilation=5, causal=True),
        Blocked((8, 12), 4, 1),
        Blocked((8, 8), 4, 1, query_stride=2),
        Window((7, 9), 4, (2, 1)),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("query_tile", "key_tile"), [(1, 1), (4, 3), (7, 16), (200, 200)])
def test_flattened_count_is_that_of_the_flattened_mask(pattern, query_tile, key_tile) -> None:
    mask = mask_of(pattern)
    visited = sum(bool(part.any()) for rows in mask.split(query_tile) for part in rows.split(key_tile, 1))
    dense = len(mask.split(query_tile)) * len(mask.split(key_tile, 1))
    count = flattened_count(pattern, query_tile, key_tile)
    assert (count.visited, count.dense) == (visited, dense)


def test_flattened_count_in_bands(monkeypatch) -> None:
    pattern = Neighborhood((9, 10), 3)
    whole = flattened_count(pattern, 4, 8)
    monkeypatch.setattr("vislm.kernels.simulator.flattened._BAND", 1000)
    assert flattened_count(pattern, 4, 8) == whole


def test_other_grid_patterns() -> None:
    windows = simulate(Window((56, 56), 7), 7)
    assert (windows.static_bound, windows.block_sparse, windows.static) == (64.0, True, 64)
    assert not simulate(Window((56, 56), 7, 3), 7).block_sparse
    halo = simulate(Blocked((32, 32), 8, 3, border="zero"), 8, 7)
    assert halo.dynamic_block_sparse  # 14 keys for every block, zero keys included
    assert halo.dynamic == 16 * 4
    strided = simulate(Blocked((16, 16), 8, 0, query_stride=2), 4, 8)
    assert (strided.block_sparse, strided.static_bound) == (True, 4.0)


def test_dilation_groups_are_tiled_one_by_one() -> None:
    groups = axis_tiles(Neighborhood(9, 3, dilation=2), 0, 2, 2)
    assert [(group.query_tiles, group.key_tiles) for group in groups] == [(3, 3), (2, 2)]
    assert [group.allowed for group in groups] == [15, 12]


def test_suggestions_are_block_sparse_and_complete() -> None:
    """No neighborhood that needs no mask is missing, as far as its strides hold whole tiles."""
    wanted = Neighborhood((12, 16), (5, 6))
    found = {(s.pattern.window, s.pattern.stride): s.speedup for s in suggest_windows(wanted, (2, 4), reach=3)}
    for window in product(range(2, 9), range(3, 10)):
        for stride in product(range(1, window[0] + 1), range(1, window[1] + 1)):
            speedup = simulate(Neighborhood((12, 16), window, stride=stride), (2, 4))
            whole = all(s % tile == 0 or s == w for s, tile, w in zip(stride, (2, 4), window, strict=True))
            assert ((window, stride) in found) == (speedup.block_sparse and whole)
            if (window, stride) in found:
                assert found[window, stride] == speedup


def test_suggestions_come_in_order() -> None:
    found = suggest_windows(Neighborhood((32, 32), (8, 8)), 4)
    distances = [sum(abs(size - 8) for size in s.pattern.window) for s in found]
    assert distances == sorted(distances)
    assert found[0].pattern.window == (8, 8)
    bounds = [s.speedup.static_bound for s in found if s.pattern.window == (8, 8)]
    assert bounds == sorted(bounds, reverse=True)


def test_suggestions_with_dynamic_keys_include_those_with_static_ones() -> None:
    wanted = Neighborhood((24, 32), (8, 16), dilation=(1, 2))
    static, dynamic = (
        {(s.pattern.window, s.pattern.stride) for s in suggest_windows(wanted, (4, 4), tiling=tiling)}
        for tiling in ("static", "dynamic")
    )
    assert static < dynamic


def test_causal_axes_never_share_a_window() -> None:
    assert suggest_windows(Neighborhood(64, 16, causal=True), 8) == []


@pytest.mark.parametrize("tile", [0, (8, 8, 8), "8", 2.0])
def test_bad_tiles(tile) -> None:
    with pytest.raises(UsageError, match="query_tile"):
        simulate(Neighborhood((16, 16), 3), tile)


def test_bad_arguments() -> None:
    with pytest.raises(UnknownName, match="did you mean 'static'"):
        suggest_windows(Neighborhood(16, 4), 2, tiling="statik")
    with pytest.raises(UsageError, match="reach"):
        suggest_windows(Neighborhood(16, 4), 2, reach=-1)
    with pytest.raises(UsageError, match="smaller"):
        suggest_windows(Neighborhood((64, 64, 64), 32), 1, reach=30)
    with pytest.raises(UsageError, match="at least 1"):
        flattened_count(Neighborhood(16, 4), 0)
