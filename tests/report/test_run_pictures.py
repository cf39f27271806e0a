"""Pictures of samples: found where they may be found, and what lies over them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vislm.data.scenes import write_scenes
from vislm.errors import UsageError
from vislm.eval.specs import open_benchmark
from vislm.report.runs.calibration import bins, expected_error
from vislm.report.runs.kept import kept_text, veil
from vislm.report.runs.pictures import DataFolder, PictureFinder, thumbnail


def finder(*folders, benchmark: str = "toyqa") -> PictureFinder:
    return PictureFinder(benchmark, [DataFolder.parse(str(folder)) for folder in folders])


@pytest.fixture
def folder(tmp_path):
    for name in ("images/a.png", "images/deep/er/b.png", "one/c.png", "two/c.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), "red").save(path)
    Image.new("RGB", (5, 5)).save(tmp_path / "secret.png")
    return tmp_path / "data"


def test_pictures_are_found_by_name(folder) -> None:
    found = finder(folder).find({"id": "1", "images": ["a.png", "deep/er/b.png", "b.png", "none.png"]})
    assert [picture is not None for picture in found] == [True, True, True, False]


def test_a_name_of_several_pictures_is_not_guessed(folder) -> None:
    looking = finder(folder)
    assert looking.find({"id": "1", "images": ["c.png"]}) == [None]
    assert "several pictures" in " ".join(looking.notes)
    assert looking.find({"id": "1", "images": ["one/c.png"]}) != [None]


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "images/../../secret.png", "a\0.png", "", "..", "C:x"]
)
def test_names_that_leave_the_folder_are_not_opened(folder, name) -> None:
    assert finder(folder).find({"id": "1", "images": [name]}) == [None]


def test_links_out_of_the_folder_are_not_followed_unless_their_target_is_named(folder) -> None:
    (folder / "images" / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "out").symlink_to(folder.parent)
    rows = [{"id": "1", "images": [name]} for name in ("link.png", "out/secret.png")]
    looking = finder(folder)
    assert [looking.find(row) for row in rows] == [[None], [None]]
    assert "behind a link" in " ".join(looking.notes)
    assert all(finder(folder, folder.parent).find(row) != [None] for row in rows)


def test_broken_pictures_are_named(folder) -> None:
    (folder / "images" / "bad.png").write_bytes(b"not a picture")
    looking = finder(folder)
    assert looking.find({"id": "1", "images": ["bad.png"]}) == [None]
    assert "bad.png" in " ".join(looking.notes)


def test_the_reader_of_the_benchmark_knows_the_pictures_by_sample(tmp_path) -> None:
    data = write_scenes(tmp_path / "scenes", 3, 1)
    sample = open_benchmark("chair", data).samples[1]
    (data / "more").mkdir()
    Image.new("RGB", (3, 3)).save(data / "more" / sample.image_names[0])
    (picture,) = finder(f"chair={data}", benchmark="chair").find({"id": sample.id, "images": sample.image_names})
    assert picture is not None
    assert picture.size != (3, 3)


def test_data_folders() -> None:
    with pytest.raises(UsageError, match="nowhere"):
        DataFolder.parse("pope:suffix=short=nowhere")


def test_veil_covers_what_was_dropped() -> None:
    entry = {"of": 4, "index": [1], "grid": [2, 2, 0, 2], "seen": [0.25, 0.0, 0.75, 1.0]}
    drawn = veil(entry, (40, 20))
    assert drawn is not None
    alpha = np.asarray(drawn)[..., 1]
    assert (alpha[:, :10] == alpha[:, 30:]).all()
    assert (alpha[:10, 20:30] == 0).all()
    assert (alpha[10:, 10:30] > 0).all()
    assert alpha[0, 0] > alpha[0, 10] > 0
    assert kept_text(entry) == "1 of 4 tokens"


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(-2, 2), st.text(max_size=3)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["of", "index", "grid", "seen"]), inner)
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_entry_draws_or_does_not(entry) -> None:
    drawn = veil(entry, (16, 12))
    assert drawn is None or drawn.size == (16, 12)
    assert isinstance(kept_text(entry), str)


def test_thumbnails_are_copies_of_a_moderate_size() -> None:
    large = Image.new("RGB", (2000, 1000))
    assert thumbnail(large).size == (240, 120)
    assert large.size == (2000, 1000)


def test_calibration() -> None:
    rows = {str(n): {"values": {"margin": m, "label": y}} for n, (m, y) in enumerate([(0.0, 1), (0.0, 0), (900.0, 1)])}
    found = bins({**rows, "none": {}, "caption": {"values": {"length": 3.0}}})
    assert [(b.n, b.predicted, b.observed) for b in found] == [(2, 0.5, 0.5), (1, 1.0, 1.0)]
    assert expected_error(found) == 0.0
    assert expected_error(bins({"a": {"values": {"margin": -900.0, "label": 1.0}}})) == 1.0
