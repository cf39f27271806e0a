"""The documentation's gallery is what the command makes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vislm.backbones import list_models
from vislm.cli import app
from vislm.report import gallery
from vislm.report.attention_views import VIEWS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / gallery.PAGE).read_text(encoding="utf-8")


def test_the_page_is_the_one_that_the_command_writes() -> None:
    assert gallery.page() == PAGE


def test_the_page_shows_the_pictures_that_there_are() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(gallery/([a-z_]+)\.png\)", PAGE)
    assert shown == [entry.name for entry in gallery.ENTRIES]
    assert sorted(shown) == sorted(path.stem for path in (DOCS / gallery.FOLDER).iterdir())
    assert "gallery.md" in (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")


def test_pictures_are_small() -> None:
    sizes = [path.stat().st_size for path in (DOCS / gallery.FOLDER).iterdir()]
    assert max(sizes) < 150_000
    assert sum(sizes) < 1_500_000
    for path in (DOCS / gallery.FOLDER).iterdir():
        with Image.open(path) as picture:
            assert picture.width <= 1100


def test_it_says_that_nothing_is_trained() -> None:
    assert "No weights here are trained" in PAGE


def test_every_family_is_there() -> None:
    families = {"nat", "dinat", "halonet", "agent", "stvit", "sg", "moh", "van"}
    ours = {entry.model for entry in gallery.ENTRIES} & set(list_models())
    assert {name.split("_")[0] for name in ours} == families
    assert len(gallery.ENTRIES) <= len(VIEWS)


def test_all_pictures_are_drawn_and_then_the_page(monkeypatch, tmp_path) -> None:
    asked = []

    def draw(backbone, image, out, **options):
        asked.append((backbone, image, options))
        return out

    monkeypatch.setattr(gallery, "load_backbone", lambda name: name)
    monkeypatch.setattr(gallery, "attention_figure", draw)
    paths = list(gallery.draw_gallery(tmp_path))
    assert [path.name for path in paths] == [*(f"{entry.name}.png" for entry in gallery.ENTRIES), "gallery.md"]
    assert (tmp_path / "gallery.md").read_text(encoding="utf-8") == PAGE
    assert {options["queries"] for _, _, options in asked} == {(gallery.QUERY,)}
    assert {image for _, image, _ in asked} == {gallery.PHOTOGRAPH}


@pytest.mark.parametrize("entry", [e for e in gallery.ENTRIES if e.name in ("agent", "large_kernel")])
def test_the_command_under_a_picture_draws_it(entry, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.open(gallery.PHOTOGRAPH).save("photo.jpg")
    result = CliRunner().invoke(app, shlex.split(gallery.command(entry))[1:])
    assert result.exit_code == 0, result.output
    with Image.open(f"{entry.name}.png") as drawn, Image.open(DOCS / gallery.FOLDER / f"{entry.name}.png") as shown:
        assert drawn.size == shown.size
