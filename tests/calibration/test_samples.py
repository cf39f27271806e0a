"""Calibration samples from scenes and folders."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vislm.calibration.samples import load_samples
from vislm.errors import AnnotationError, UsageError


def folder(path, rows) -> str:
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path / f"{number}.png")
    if rows is not None:
        (path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_scenes_ask_for_present_and_absent_objects_in_turn() -> None:
    samples = load_samples("scenes", 4, 0, "", captions=False)
    assert [sample.answer for sample in samples] == ["yes", "no", "yes", "no"]
    for sample in samples:
        assert (sample.question.split()[3] in sample.objects) == (sample.answer == "yes")
    assert len({sample.digest for sample in samples}) == 4
    assert load_samples("scenes", 4, 1, "", captions=False)[0].digest != samples[0].digest
    captions = load_samples("scenes", 2, 0, "", captions=True)
    assert {sample.question for sample in captions} == {"describe the image ."}


def test_folders(tmp_path) -> None:
    rows = [
        {"image": "0.png", "question": "Is it red?", "answer": "no", "objects": ["cat", "dog"]},
        {"image": "1.png"},
    ]
    first, second = load_samples(folder(tmp_path, rows), 5, 0, "What is it?", captions=True)
    assert (first.question, first.answer, first.objects) == ("Is it red?", "no", frozenset({"cat", "dog"}))
    assert (second.question, second.answer, second.objects) == ("What is it?", None, None)
    assert first.digest != second.digest
    (tmp_path / "samples.jsonl").unlink()
    assert len(load_samples(str(tmp_path), 2, 0, "What is it?", captions=True)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ("[]", "line 1"),
        ('{"question": "a"}', "line 1"),
        ('{"image": "9.png"}', "no file"),
        ('{"image": "0.png", "objects": "cat"}', "expected a list"),
    ],
)
def test_broken_lists(tmp_path, line, message) -> None:
    folder(tmp_path, None)
    (tmp_path / "samples.jsonl").write_text(line)
    with pytest.raises(AnnotationError, match=message):
        load_samples(str(tmp_path), 1, 0, "", captions=True)


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(UsageError, match="holds no"):
        load_samples(str(tmp_path), 1, 0, "", captions=True)
    with pytest.raises(UsageError, match="neither"):
        load_samples("scene", 1, 0, "", captions=True)
