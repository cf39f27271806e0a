"""Pictures of patterns show what the masks say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from vislm.errors import UsageError
from vislm.kernels import Blocked, Causal, Dense, Neighborhood, Padded, Window
from vislm.report.patterns import _EDGE, _HEAD, _SIDE, Panel, draw_gallery, gallery, pattern_figure, pattern_mask

BLUE, GREY, VERMILION = (0, 114, 178), (227, 232, 237), (213, 94, 0)


def cells(path, size: int, rows: int | None = None, left: int = 0) -> np.ndarray:
    """Read the colours near the upper left corner of every cell of a square (the query's dot is in the middle)."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    step = _SIDE / size
    places = [round((index + 0.13) * step) for index in range(size)]
    return picture[_HEAD + np.array(places[:rows])[:, None], _EDGE + left + np.array(places)[None]]


def seen(colours: np.ndarray) -> np.ndarray:
    distance = {name: np.abs(colours - np.array(colour)).sum(-1) for name, colour in (("b", BLUE), ("g", GREY))}
    assert (np.minimum(distance["b"], distance["g"]) < 12).all()
    return distance["b"] < distance["g"]


@pytest.mark.parametrize(
    ("pattern", "query"),
    [
        (Neighborhood((9, 9), 5, dilation=(1, 1)), (4, 3)),
        (Neighborhood((8, 8), 3, dilation=2), (0, 5)),
        (Blocked((9, 9), 3, 1), (8, 8)),
        (Window((6, 6), 3, 1), (0, 5)),
    ],
    ids=repr,
)
def test_the_query_sees_what_the_picture_shows(pattern, query, tmp_path) -> None:
    path = pattern_figure([Panel("title", pattern, query)], tmp_path / "a.png")
    side = pattern.grid[0]
    row = pattern_mask(Panel("", pattern))[query[0] * side + query[1]].reshape(side, side)
    assert (seen(cells(path, side)) == row).all()


def test_the_mask_is_drawn_cell_by_cell(tmp_path) -> None:
    valid = torch.tensor([[True] * 7 + [False] * 2])
    path = pattern_figure([Panel("title", Padded(valid, causal=True), sizes=(9, 9))], tmp_path / "a.png", columns=1)
    expected = np.tril(np.ones((9, 9), dtype=bool)) & valid.numpy()
    assert (seen(cells(path, 9)) == expected).all()


def test_the_dot_is_where_the_query_stands(tmp_path) -> None:
    path = pattern_figure([Panel("title", Neighborhood((9, 9), 3), (2, 6))], tmp_path / "a.png")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)[:, : _EDGE + _SIDE]
    y, x = np.nonzero(np.abs(picture - np.array(VERMILION)).sum(-1) < 12)
    step = _SIDE / 9
    assert (y.mean() - _HEAD) / step == pytest.approx(2.5, abs=0.1)
    assert (x.mean() - _EDGE) / step == pytest.approx(6.5, abs=0.1)


def test_prefix_tokens_stand_above_the_grid(tmp_path) -> None:
    pattern = Neighborhood((4, 5), 3, prefix=2)
    path = pattern_figure([Panel("title", pattern, (3, 4))], tmp_path / "a.png")
    drawn = cells(path, 5)
    row = pattern_mask(Panel("", pattern))[2 + 3 * 5 + 4]
    assert seen(drawn[0, :2]).all()
    assert (drawn[0, 2:] == 255).all()
    assert (seen(drawn[1:]) == row[2:].reshape(4, 5)).all()


def test_masks() -> None:
    assert pattern_mask(Panel("", Dense(), sizes=(2, 3))).all()
    assert pattern_mask(Panel("", Causal(), sizes=(2, 3))).tolist() == [[True, True, False], [True, True, True]]
    prefixed = pattern_mask(Panel("", Window(6, 3, prefix=1)))
    assert prefixed.shape == (7, 7)
    assert prefixed[0].all()
    assert prefixed[:, 0].all()
    strided = Blocked((4, 4), 2, query_stride=2)
    assert pattern_mask(Panel("", strided)).shape == (4, 16)


def test_gallery(tmp_path) -> None:
    paths = draw_gallery(tmp_path)
    assert [path.name for path in paths] == list(gallery())
    for path in paths:
        with Image.open(path) as picture:
            assert max(picture.size) <= 1200
    shown = {type(panel.pattern) for panels in gallery().values() for panel in panels}
    assert shown == {Dense, Causal, Padded, Neighborhood, Blocked, Window}


def test_a_sequence_is_drawn_as_one_row(tmp_path) -> None:
    pattern = Neighborhood(12, 5)
    path = pattern_figure([Panel("title", pattern, (6,))], tmp_path / "a.png")
    assert (seen(cells(path, 12, rows=1))[0] == pattern_mask(Panel("", pattern))[6]).all()


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ([], "at least one"),
        ([Panel("", Dense())], "give sizes="),
        ([Panel("", Dense(), (1, 1), sizes=(4, 4))], "grids of 1 or 2 axes"),
        ([Panel("", Neighborhood((3, 3, 3), 3), (1, 1, 1))], "grids of 1 or 2 axes"),
        ([Panel("", Neighborhood((3, 3), 3), (1, 3))], r"not a place on the query grid \(3, 3\)"),
        ([Panel("", Neighborhood((3, 3), 3), (1,))], "not a place"),
    ],
)
def test_mistakes(panels, message, tmp_path) -> None:
    with pytest.raises(UsageError, match=message):
        pattern_figure(panels, tmp_path / "a.png")


def test_three_axes_have_a_mask() -> None:
    grid = (2, 3, 4)
    assert pattern_mask(Panel("", Neighborhood(grid, 2))).shape == (math.prod(grid),) * 2
