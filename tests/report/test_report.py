"""Pictures, tables and pages."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from vislm import FastV, FlowCut, load_lmm
from vislm.data.scenes import generate_scenes
from vislm.errors import ImageError, UsageError
from vislm.lmm.adapters.llava import Grid
from vislm.lmm.run import Run
from vislm.report.heads import head_figure
from vislm.report.overlay import kept_map, kept_overlay, seen_picture
from vislm.report.page import Facts, Figure, Section, Table, Text, render_page
from vislm.report.run_table import run_lines
from vislm.report.tables import markdown_table, metrics_table, text_table
from vislm.report.tokens import token_figure, token_panels

PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "</table><iframe src='https://evil.example'></iframe>",
    "javascript:alert(1)",
    "&lt;b&gt;",
    "<svg/onload=alert(1)>",
]


def test_kept_patches_are_clear_and_dropped_ones_faded() -> None:
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    drawn = np.asarray(kept_overlay(image, Grid(8, 8, 0, 8), {0, 9, 63}))
    cell = drawn.shape[0] // 8
    middle = drawn[cell // 2 :: cell, cell // 2 :: cell]
    kept = (middle == (200, 30, 30)).all(-1)
    assert sorted(map(tuple, np.argwhere(kept).tolist())) == [(0, 0), (1, 1), (7, 7)]
    assert (middle[~kept] > 200).all()


def test_grids_with_newlines_find_their_tokens() -> None:
    grid = Grid(height=2, width=3, start=16, row_stride=4)
    assert kept_map(grid, {16, 19, 20, 22}).tolist() == [[True, False, False], [True, False, True]]


@pytest.mark.parametrize(("grid", "kept"), [(Grid(0, 3, 0, 3), {0}), (Grid(2, 2, 0, 2), {-1})])
def test_impossible_overlays(grid, kept) -> None:
    with pytest.raises(UsageError):
        kept_overlay(Image.new("RGB", (8, 8)), grid, kept)


def test_the_overlay_shows_what_the_tower_sees() -> None:
    lmm = load_lmm()
    wide = Image.new("RGB", (200, 100))
    assert seen_picture(wide, lmm.adapter, lmm.processor).size == (200, 100)  # squashed, not cropped

    class Crops:
        class image_processor:
            do_center_crop, size, crop_size = True, {"shortest_edge": 336}, {"height": 336, "width": 336}

    assert seen_picture(wide, lmm.adapter, Crops).size == (100, 100)


def test_token_and_head_figures(tmp_path) -> None:
    lmm, scene = load_lmm(), next(generate_scenes(1, 5))
    rows = []
    for label, method in (("flowcut", FlowCut(keep=8)), ("fastv", FastV(keep=4))):
        with lmm.using(method):
            rows.append((label, lmm.ask(scene.image, "describe the image ."), lmm.last_run))
    assert [len(token_panels(scene.image, *row, lmm.adapter)) for row in rows] == [1, 1]
    with Image.open(token_figure(scene.image, rows, lmm.adapter, tmp_path / "t.png")) as picture:
        assert min(picture.size) > 200
    with pytest.raises(UsageError, match="number 3"):
        token_figure(scene.image, rows, lmm.adapter, tmp_path / "t.png", number=3)
    from vislm import VHR

    with lmm.using(VHR()):
        lmm.ask(scene.image, "describe the image .")
    with Image.open(head_figure(lmm.last_run, lmm.model.config.text_config, tmp_path / "h.png", "t")) as picture:
        assert min(picture.size) > 200
    lines = "\n".join(run_lines(lmm.last_run))
    assert "heads" in lines
    assert "64" in lines


def test_run_lines_of_an_empty_run() -> None:
    assert isinstance(run_lines(Run()), list)
    run = Run(head_factors={1: torch.ones(1, 4)})
    assert run_lines(run)


def test_tables_align_and_escape() -> None:
    rows = [{"name": "a|b", "value": 0.5}, {"name": "c\nd", "value": 12345.678}, {"name": None}]
    assert "a\\|b" in markdown_table(rows)
    assert "c<br>d" in markdown_table(rows)
    assert len(markdown_table(rows).splitlines()) == 5
    plain = text_table(rows[:1]).splitlines()
    assert len(plain) == 3
    text = metrics_table({"benchmark": "pope", "n": 3, "n_missing": 1, "metrics": {"random": {"accuracy": 0.5}}})
    assert "1 MISSING" in text
    assert "0.500" in text


@pytest.mark.parametrize("payload", PAYLOADS)
def test_pages_escape_everything(payload, tmp_path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    blocks = [
        Text(payload),
        Table([{payload: payload}], payload),
        Figure(tmp_path / "p.png", payload),
        Facts({payload: payload}),
    ]
    page = render_page(payload, [Section(payload, blocks), Section(payload)], lead=payload, footer=payload)
    for tag in ("<script", "<iframe", "<svg", "<img src=x", "onerror=alert(1)>"):
        assert tag not in page.lower().replace("&lt;", "")
    assert "{{ 7" in page if payload.startswith("{{") else True
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:|//|javascript:)", page)
    assert page.count("data:image/png;base64,") == 1


def test_only_pngs_are_inlined(tmp_path) -> None:
    (tmp_path / "p.png").write_text("<svg/>")
    with pytest.raises(ImageError, match="not a PNG"):
        render_page("t", [Section("s", [Figure(tmp_path / "p.png")])])
