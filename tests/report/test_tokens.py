"""Pictures of kept, merged and dropped patches: where tokens lie, what became of them, how they look."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vislm.lmm.adapters.base import Grid
from vislm.lmm.interventions import Kept
from vislm.lmm.run import Run
from vislm.report.overlay import colours, patch_overlay
from vislm.report.token_views import DROPPED, fates, views
from vislm.report.tokens import token_figure, token_panels

GREY = Image.new("RGB", (40, 40), (120, 120, 120))


def adapter(*grids: Grid) -> Any:
    return SimpleNamespace(crops_per_image=None, patch_grid=(2, 2), grids=lambda features, span=None: list(grids))


PLAIN = adapter(Grid(2, 2, 0, 2))


def run_of(total: int, *stages: Kept, **more: Any) -> Run:
    return Run(visual_tokens=[total], stages=list(stages), features=[torch.zeros(total, 1)], **more)


def test_merged_tokens_follow_their_seats() -> None:
    """0 and 3 share seat 3, 1 is alone, 2 is dropped; later seat 3 goes, and with it both."""
    prompt = Kept("prompt", [[1, 3]], [[1, 0, -1, 1]])
    first, later = fates(run_of(4, prompt, Kept("layer 2", [[1]])))
    assert (first.owner.tolist(), first.merged().tolist()) == ([3, 1, DROPPED, 3], [True, False, False, True])
    assert (later.owner.tolist(), later.merged().any()) == ([DROPPED, 1, DROPPED, DROPPED], False)
    assert [fate.where for fate in (first, later)] == ["all layers", "layer 2 on"]


@given(st.lists(st.integers(-1, 3), min_size=6, max_size=6))
def test_every_token_has_one_fate(into: list[int]) -> None:
    (fate,) = fates(run_of(6, Kept("prompt", [[0, 2, 4, 5]], [into])))
    for token, seat in enumerate(into):
        assert fate.owner[token] == (DROPPED if seat < 0 else [0, 2, 4, 5][seat])
        assert fate.merged()[token] == (seat >= 0 and into.count(seat) > 1)


def test_nothing_dropped_and_everything_dropped() -> None:
    (fate,) = fates(run_of(4))
    assert (fate.where, fate.owner.tolist(), fate.merged().any()) == ("nothing dropped", [0, 1, 2, 3], False)
    (gone,) = fates(run_of(3, Kept("prompt", [[]], [[-1, -1, -1]])))
    assert gone.owner.tolist() == [DROPPED] * 3


def test_stages_inside_the_tower() -> None:
    steps = [(1, torch.tensor([[0, 1, 3], [0, 1, 2]]), torch.tensor([[True, True, False], [True] * 3]))]
    run = Run(visual_tokens=[4, 4], tower_tokens=[4, 3], tower_steps=steps, stages=[Kept("prompt", [[0, 1], [1, 2]])])
    assert [f.where for f in fates(run, 0)] == ["all layers"]
    assert [(f.where, f.kept) for f in fates(run, 0, tower=True)] == [
        ("tower layer 1 on", [0, 1]),
        ("all layers", [0, 1]),
    ]
    assert fates(run, 1, tower=True)[0].owner.tolist() == [0, 1, 2, DROPPED]
    tiled = Run(visual_tokens=[9], tower_tokens=[4, 3], tower_steps=steps, stages=[])
    assert len(fates(tiled, 0, tower=True)) == 1


def test_views_of_tiles_and_frames() -> None:
    newlines = adapter(Grid(2, 2, 0, 2), Grid(2, 3, 4, 4))
    base, tiles = views(run_of(12), newlines)
    assert (base.name, tiles.name) == ("base view", "tiles")
    assert tiles.tokens.tolist() == [[4, 5, 6], [8, 9, 10]]
    film = run_of(8, spans=[(2, 2, 2)])
    assert [view.name for view in views(film, adapter(Grid(2, 2, 0, 2), Grid(2, 2, 4, 2)))] == ["frame 0", "frame 1"]


@pytest.mark.parametrize(("ratio", "rows"), [(1.0, 2), (4.0, 1), (0.2, 4)])
def test_tiles_that_the_model_is_not_told_of(ratio, rows) -> None:
    """Four tiles of four tokens, then the whole image: the picture's shape says how they lie."""
    whole, tiles = views(run_of(20), adapter(Grid(2, 2, 16, 2)), ratio=ratio)
    assert whole.tokens.tolist() == [[16, 17], [18, 19]]
    assert tiles.tokens.shape == (2 * rows, 8 // rows)
    assert sorted(tiles.tokens.flatten()) == list(range(16))
    second = {1: (0, 2), 2: (0, 2), 4: (2, 0)}[rows]
    assert tiles.tokens[second] == 4


def test_merged_patches_share_a_colour() -> None:
    alive, group = np.array([[True, True], [True, False]]), np.array([[0, 0], [-1, -1]])
    drawn = np.asarray(patch_overlay(GREY, alive, group))
    cell = drawn.shape[0] // 2

    def middle(row: int, column: int) -> list[int]:
        return drawn[row * cell + cell // 2, column * cell + cell // 2].tolist()

    assert middle(0, 0) == middle(0, 1) != middle(1, 0) == [120, 120, 120]
    assert min(middle(1, 1)) > 220
    other = np.asarray(patch_overlay(GREY, alive, np.where(group == 0, 1, group)))
    assert other[cell // 2, cell // 2].tolist() != middle(0, 0)


def test_neighbouring_groups_differ() -> None:
    found = colours(np.arange(24))
    assert found.min() >= 0
    assert found.max() <= 255
    for one, two in pairwise(found):
        assert np.abs(one - two).max() > 60


def test_panels_say_what_was_merged(tmp_path) -> None:
    run = run_of(4, Kept("prompt", [[1, 3]], [[1, 0, -1, 1]]))
    (panel,) = token_panels(GREY, "visionzip", "a cat", run, PLAIN)
    assert panel.subtitle == "2 of 4 tokens, all layers"
    assert panel.caption == "2 patches merged into 1, 1 dropped\na cat"
    long = run_of(4, *[Kept(f"layer {n}", [[n]]) for n in range(3)])
    with Image.open(token_figure(GREY, [("a", "", run), ("b", "", long)], PLAIN, tmp_path / "row.png")) as row:
        one = row.size
    with Image.open(token_figure(GREY, [("b", "", long), ("b", "", long)], PLAIN, tmp_path / "two.png")) as two:
        assert two.width < one[0]
        assert two.height > 1.7 * one[1]
