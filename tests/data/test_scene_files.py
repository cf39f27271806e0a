"""Scenes on disk: COCO annotation files that say what the pictures show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vislm.data.scene_categories import CATEGORIES
from vislm.data.scenes import generate_scenes, write_scenes
from vislm.data.turns import caption
from vislm.errors import UnknownName


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 7, 42)


def test_files_describe_the_scenes(folder: Path) -> None:
    instances = json.loads((folder / "instances.json").read_text())
    captions = json.loads((folder / "captions.json").read_text())
    assert instances["info"]["generator"] == captions["info"]["generator"] == "vislm scenes"
    assert (instances["info"]["seed"], instances["info"]["difficulty"]) == (42, "hard2")
    assert [(c["id"], c["name"]) for c in instances["categories"]] == list(enumerate(CATEGORIES, 1))
    scenes = list(generate_scenes(7, 42))
    for record, said, scene in zip(instances["images"], captions["annotations"], scenes, strict=True):
        assert (record["theme"], record["width"], record["height"]) == (scene.theme, 64, 64)
        assert (said["image_id"], said["caption"]) == (record["id"], caption(scene))
        with Image.open(folder / "images" / record["file_name"]) as image:
            assert (np.asarray(image) == np.asarray(scene.image)).all()
        rows = [a for a in instances["annotations"] if a["image_id"] == record["id"]]
        for row, item in zip(rows, scene.instances, strict=True):
            assert CATEGORIES[row["category_id"] - 1] == item.category
            assert row["bbox"] == pytest.approx(item.bbox, abs=0.006)
            assert row["area"] == pytest.approx(row["bbox"][2] * row["bbox"][3], abs=0.006)
            assert (row["iscrowd"], row["colour"], row["occluded"]) == (0, item.colour, item.occluded)
            assert row["contrast"] == pytest.approx(item.contrast, abs=0.006)
    assert [a["id"] for a in instances["annotations"]] == list(range(1, len(instances["annotations"]) + 1))


def test_writing_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, 7, 42)
    for path in folder.rglob("*.*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_nothing_is_written_for_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(UnknownName):
        write_scenes(tmp_path / "out", 2, 0, difficulty="harder")
    assert not (tmp_path / "out").exists()
