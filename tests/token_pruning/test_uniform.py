"""Uniform pruning keeps exactly the budget, evenly."""

from __future__ import annotations

import models
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import FAMILIES, families, generate, one_image

from vislm import FlowCut
from vislm.token_pruning.uniform import UniformPruning, spread, spread_on_grid


@given(height=st.integers(1, 30), width=st.integers(1, 30), data=st.data())
def test_the_budget_is_met_with_distinct_cells(height: int, width: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, height * width))
    rows, columns = spread_on_grid(count, height, width)
    cells = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert len(cells) == count
    assert all(0 <= r < height and 0 <= c < width for r, c in cells)


def test_a_quarter_of_a_square_is_every_second_cell() -> None:
    rows, columns = spread_on_grid(16, 8, 8)
    assert sorted(set(rows.tolist())) == sorted(set(columns.tolist())) == [1, 3, 5, 7]


def test_spread_is_centred() -> None:
    assert spread(3, 9).tolist() == [1, 4, 7]
    assert spread(1, 5).tolist() == [2]


@families
def test_every_view_of_a_tiled_image_gets_its_share(family: str) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    _, _, run = generate(model, inputs, UniformPruning(keep=8))
    assert run.visual_tokens_kept == [8]
    kept = torch.tensor(run.stages[0].index[0])
    if family == "llava_next":  # 16 patches in the base view, 48 in the tiles
        assert int((kept < 16).sum()) == 2


def test_behind_a_thinned_tower_it_spaces_what_is_left() -> None:
    model, inputs = models.llava(), one_image("llava")
    _, _, run = generate(model, inputs, FlowCut(keep=8), UniformPruning(keep=4, positions="contiguous"))
    assert run.visual_tokens_kept == [4]
