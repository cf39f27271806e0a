"""Overlays, sheets, curves and head maps."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vislm.errors import UsageError
from vislm.lmm.adapters.llava import Grid
from vislm.lmm.interventions import Kept
from vislm.lmm.run import Run
from vislm.report.curves import Chart, Curve, curve_figure
from vislm.report.heads import head_figure
from vislm.report.overlay import kept_overlay, seen_picture
from vislm.report.panels import Panel, panel_figure
from vislm.report.png import save_picture
from vislm.report.tokens import token_figure, token_panels

ADAPTER: Any = SimpleNamespace(
    crops_per_image=1, patch_grid=(2, 2), grids=lambda features: [Grid(2, 2, start=0, row_stride=2)]
)
TILED: Any = SimpleNamespace(
    crops_per_image=None,
    patch_grid=(2, 2),
    grids=lambda features: [Grid(2, 2, start=0, row_stride=2), Grid(2, 4, start=4, row_stride=5)],
)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(st.sets(st.integers(0, 11)))
def test_kept_patches_are_the_picture_itself(kept: set[int]) -> None:
    image = noise(64, 48)
    drawn = np.asarray(kept_overlay(image, Grid(3, 4, start=0, row_stride=4), kept))
    clear = np.asarray(kept_overlay(image, Grid(3, 4, start=0, row_stride=4), range(12)))
    cell = drawn.shape[1] // 4
    for token in range(12):
        place = np.s_[token // 4 * cell : (token // 4 + 1) * cell, token % 4 * cell : (token % 4 + 1) * cell]
        assert (drawn[place] == clear[place]).all() == (token in kept)
        if token not in kept:
            inner = drawn[place][cell // 8 : -cell // 8, cell // 8 : -cell // 8].astype(int)
            assert (inner.max(-1) == inner.min(-1)).all()  # grey
            assert inner.min() >= round(0.82 * 255) - 1


def processor(**settings: Any) -> Any:
    return SimpleNamespace(image_processor=SimpleNamespace(**settings))


def test_a_centre_crop_hides_the_ends_of_the_long_side() -> None:
    crop = {"height": 336, "width": 336}
    llava = processor(do_center_crop=True, size={"shortest_edge": 336}, crop_size=crop)
    image = noise(300, 100)
    seen = seen_picture(image, ADAPTER, llava)
    assert np.array_equal(np.asarray(seen), np.asarray(image)[:, 100:200])
    larger = processor(do_center_crop=True, size={"shortest_edge": 672}, crop_size=crop)
    assert seen_picture(image, ADAPTER, larger).size == (50, 50)
    squashed = processor(do_center_crop=True, size={"height": 336, "width": 336}, crop_size=crop)
    assert seen_picture(image, ADAPTER, squashed).size == (300, 100)
    assert seen_picture(image, TILED, llava) is image
    assert seen_picture(image, ADAPTER) is image


def test_one_panel_per_stage_and_grid() -> None:
    stages = [Kept("prompt", [[0], [0, 1, 4, 7, 9]]), Kept("layer 2", [[0], [1, 9]])]
    run = Run(visual_tokens=[14, 14], stages=stages, features=[torch.zeros(14, 1)] * 2)
    panels = token_panels(noise(8, 8), "both", "yes", run, TILED, number=1)
    assert [panel.subtitle for panel in panels] == [
        "base view: 2 of 4 tokens, all layers",
        "tiles: 3 of 8 tokens, all layers",
        "base view: 1 of 4 tokens, layer 2 on",
        "tiles: 1 of 8 tokens, layer 2 on",
    ]
    assert panels[1].picture.size == (2 * panels[1].picture.height, panels[1].picture.height)


def test_without_stages_nothing_is_faded() -> None:
    (panel,) = token_panels(noise(8, 8), "none", "", Run(visual_tokens=[4]), ADAPTER)
    assert panel.subtitle == "4 of 4 tokens, nothing dropped"
    assert np.array_equal(np.asarray(panel.picture), np.asarray(kept_overlay(noise(8, 8), Grid(2, 2, 0, 2), range(4))))


def test_single_panels_stand_side_by_side(tmp_path) -> None:
    run = Run(visual_tokens=[4], stages=[Kept("prompt", [[1]])])
    rows = [(f"method {n}", "yes", run) for n in range(5)]
    with Image.open(token_figure(noise(8, 8), rows[:4], ADAPTER, tmp_path / "four.png")) as four:
        wide, low = four.size
    with Image.open(token_figure(noise(8, 8), rows, ADAPTER, tmp_path / "five.png")) as five:
        assert five.width == wide
        assert five.height > 1.7 * low


def test_text_that_looks_like_a_formula_is_drawn(tmp_path) -> None:
    payload = "costs $\\frac{1}{$ and $x^ <b> " * 9
    panel_figure([[Panel(noise(4, 4), payload, payload, payload, good=False)]], tmp_path / "p.png", payload)
    curve_figure([Chart(payload, payload, [Curve(payload, [1, 2], [1, 2])])], tmp_path / "c.png")


def test_colour_of_the_caption_says_right_or_wrong(tmp_path) -> None:
    def tint(good: bool) -> np.ndarray:
        picture = Image.new("RGB", (8, 8), "white")
        path = panel_figure([[Panel(picture, "", "", "M" * 30, good)]], tmp_path / f"{good}.png")
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB")).reshape(-1, 3).min(0).astype(int)

    right, wrong = tint(True), tint(False)
    assert right[1] > right[0]
    assert wrong[0] > wrong[1]


def test_head_maps_with_and_without_divergence(tmp_path) -> None:
    config = SimpleNamespace(num_hidden_layers=4, num_attention_heads=4)
    run = Run(batch=1, head_factors={1: torch.tensor([[2.0, 1.0, 1.0, 0.5]])})
    with Image.open(head_figure(run, config, tmp_path / "one.png", "t")) as one:
        narrow = one.width
    run.memory = defaultdict(dict, {0: {"vhd": {1: torch.tensor([[3.0, 1.0, 0.0, 2.0]])}}})
    with Image.open(head_figure(run, config, tmp_path / "two.png", "t")) as two:
        assert two.width > 1.5 * narrow


@pytest.mark.parametrize(("layers", "heads"), [(32, 32), (80, 64), (2, 1)])
def test_head_maps_of_any_size(layers: int, heads: int, tmp_path) -> None:
    config = SimpleNamespace(num_hidden_layers=layers, num_attention_heads=heads)
    run = Run(batch=1, head_factors={n: torch.ones(1, heads) for n in range(layers)})
    with Image.open(head_figure(run, config, tmp_path / "h.png")) as image:
        assert max(image.size) < 1600


def test_nothing_to_draw(tmp_path) -> None:
    config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=2)
    scaled = Run(batch=1, head_factors={0: torch.ones(1, 2)})
    out = tmp_path / "x.png"
    with pytest.raises(UsageError, match="scaled no heads"):
        head_figure(Run(), config, out)
    with pytest.raises(UsageError, match="1 samples"):
        head_figure(scaled, config, out, sample=1)
    with pytest.raises(UsageError, match="no panels"):
        panel_figure([[], []], out)
    with pytest.raises(UsageError, match="no curves"):
        curve_figure([Chart("x", "y", [])], out)
    with pytest.raises(UsageError, match="2 x and 1 y"):
        curve_figure([Chart("x", "y", [Curve("a", [1, 2], [1])])], out)
    assert not out.exists()


def test_pictures_survive_a_failed_write(tmp_path) -> None:
    path = save_picture(noise(4, 4), tmp_path / "a.png")
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        save_picture(None, path)  # pyright: ignore[reportArgumentType]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
