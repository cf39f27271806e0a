"""Reports on runs of the embedded model."""

from __future__ import annotations

import pytest
from PIL import Image

from vislm import VHR, FastV, FlowCut, load_lmm
from vislm.data.scenes import generate_scenes
from vislm.errors import ImageError, UsageError
from vislm.lmm.adapters.llava import Grid
from vislm.report.heads import head_figure
from vislm.report.overlay import kept_map, kept_overlay, seen_picture
from vislm.report.page import Figure, Section, render_page
from vislm.report.run_table import run_lines
from vislm.report.tokens import token_figure, token_panels


def test_grids_with_newlines_find_their_tokens() -> None:
    grid = Grid(height=2, width=3, start=16, row_stride=4)
    assert kept_map(grid, {16, 19, 20, 22}).tolist() == [[True, False, False], [True, False, True]]


@pytest.mark.parametrize(("grid", "kept"), [(Grid(0, 3, 0, 3), {0}), (Grid(2, 2, 0, 2), {-1})])
def test_impossible_overlays(grid, kept) -> None:
    with pytest.raises(UsageError):
        kept_overlay(Image.new("RGB", (8, 8)), grid, kept)


def test_the_embedded_processor_squashes_and_hides_nothing() -> None:
    lmm = load_lmm()
    assert seen_picture(Image.new("RGB", (200, 100)), lmm.adapter, lmm.processor).size == (200, 100)


def test_token_and_head_figures(tmp_path) -> None:
    lmm, scene = load_lmm(), next(generate_scenes(1, 5))
    rows = []
    for label, method in (("flowcut", FlowCut(keep=8)), ("fastv", FastV(keep=4))):
        with lmm.using(method):
            rows.append((label, lmm.ask(scene.image, "describe the image ."), lmm.last_run))
    panels = [token_panels(scene.image, *row, lmm.adapter) for row in rows]
    assert [[panel.subtitle for panel in row] for row in panels] == [
        ["8 of 64 tokens, all layers"],
        ["4 of 64 tokens, layer 2 on"],
    ]
    with Image.open(token_figure(scene.image, rows, lmm.adapter, tmp_path / "t.png")) as picture:
        assert min(picture.size) > 200
    with pytest.raises(UsageError, match="number 3"):
        token_figure(scene.image, rows, lmm.adapter, tmp_path / "t.png", number=3)
    with lmm.using(VHR()):
        lmm.ask(scene.image, "describe the image .")
    assert lmm.last_run is not None
    with Image.open(head_figure(lmm.last_run, lmm.model.config.text_config, tmp_path / "h.png", "t")) as picture:
        assert min(picture.size) > 200
    assert run_lines(lmm.last_run)[0] == "visual tokens 64 -> 64"
    assert run_lines(lmm.last_run)[-1].startswith("heads         layer 1: ")


def test_only_pngs_are_inlined(tmp_path) -> None:
    (tmp_path / "p.png").write_text("<svg/>")
    with pytest.raises(ImageError, match="not a PNG"):
        render_page("t", [Section("s", [Figure(tmp_path / "p.png")])])
