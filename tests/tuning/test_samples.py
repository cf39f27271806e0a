"""Calibration samples."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vislm.errors import AnnotationError, UsageError
from vislm.tuning.samples import load_samples


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8), (number * 40, 0, 0)).save(tmp_path / "deep" / f"{number}.png")
    return tmp_path


def test_scenes_are_asked_in_four_ways_and_repeat_by_seed() -> None:
    one, two = load_samples("scenes", 8, 0), load_samples("scenes", 8, 0)
    assert [s.digest for s in one] == [s.digest for s in two]
    assert len({s.question.split()[0] for s in one}) == 4
    assert {s.digest for s in one}.isdisjoint(s.digest for s in load_samples("scenes", 8, 1))


def test_pictures_of_a_folder(folder) -> None:
    samples = load_samples(str(folder), 4, 0, "What is it?")
    assert len({s.digest for s in samples}) == 4
    assert {s.question for s in samples} == {"What is it?"}
    assert len(load_samples(str(folder), 99, 0)) == 6
    assert [s.digest for s in samples] == [s.digest for s in load_samples(str(folder), 4, 0, "What is it?")]


def test_a_list_of_questions(folder) -> None:
    rows = [{"image": "deep/0.png", "question": "red?"}, {"image": "deep/1.png", "question": "dark?"}]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [s.question for s in load_samples(str(folder), 9, 0)] == ["red?", "dark?"]


@pytest.mark.parametrize("line", ["{", "[]", '{"image": "deep/0.png"}', '{"image": "no.png", "question": "?"}'])
def test_broken_lists_name_the_line(folder, line) -> None:
    (folder / "samples.jsonl").write_text('{"image": "deep/0.png", "question": "?"}\n' + line)
    with pytest.raises(AnnotationError, match="line 2"):
        load_samples(str(folder), 9, 0)


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(UsageError, match="no pictures"):
        load_samples(str(tmp_path), 3, 0)
    with pytest.raises(UsageError, match="neither 'scenes' nor a folder"):
        load_samples(str(tmp_path / "no"), 3, 0)
