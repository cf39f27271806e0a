"""Faults in annotation files."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vislm.errors import AnnotationError
from vislm.eval.coco import read_captions, read_coco_folder

GOOD = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "sub/b.jpg"}],
    "categories": [{"id": 3, "name": "dog"}, {"id": 4, "name": "cat"}],
    "annotations": [
        {"id": 12, "image_id": 1, "category_id": 3, "bbox": [0, 0, 5, 5]},
        {"id": 11, "image_id": 1, "category_id": 4, "bbox": [1, 1, 2, 2.5]},
        {"id": 13, "image_id": 1, "category_id": 3, "bbox": [1, 1, 2, 2]},
    ],
}


def write(folder, data) -> None:
    (folder / "instances.json").write_text(data if isinstance(data, str) else json.dumps(data))


def test_objects_are_in_order_of_annotation_ids(tmp_path) -> None:
    write(tmp_path, GOOD)
    folder = read_coco_folder(tmp_path)
    assert folder.objects == {1: ["cat", "dog"], 2: []}
    assert folder.path(2) == tmp_path / "images" / "sub" / "b.jpg"
    assert not folder.is_scenes


def broken(*path, value):
    data = copy.deepcopy(GOOD)
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return data


FAULTS = {
    "list": ([1], "holds a list"),
    "json": ("{", "not valid JSON"),
    "no images": ({"annotations": [], "categories": []}, "'images' is NoneType"),
    "annotations object": (broken("annotations", value={}), "'annotations' is dict"),
    "no id": (broken("images", 0, value={"file_name": "x"}), r"images\[0\] has no integer id"),
    "string id": (broken("images", 0, "id", value="1"), "no integer id"),
    "bool id": (broken("images", 0, "id", value=True), "no integer id"),
    "duplicate image": (broken("images", 1, "id", value=1), "id 1 appears twice"),
    "duplicate annotation": (broken("annotations", 1, "id", value=12), "id 12 appears twice"),
    "unknown image": (broken("annotations", 0, "image_id", value=9), "annotation 12 is about unknown image 9"),
    "unknown category": (broken("annotations", 0, "category_id", value=9), "unknown category 9"),
    "no file name": (broken("images", 0, "file_name", value=None), "images id 1 has no file_name"),
    "parent": (broken("images", 0, "file_name", value="../../etc/passwd"), "leaves the image folder"),
    "backslash": (broken("images", 0, "file_name", value="..\\x"), "leaves the image folder"),
    "absolute": (broken("images", 0, "file_name", value="/etc/passwd"), "leaves the image folder"),
    "category name": (broken("categories", 0, "name", value=3), "categories id 3 has no name"),
    "no box": (broken("annotations", 0, "bbox", value=None), "annotations id 12 has no bbox"),
    "short box": (broken("annotations", 0, "bbox", value=[1, 2, 3]), "expected four finite numbers"),
    "word in box": (broken("annotations", 0, "bbox", value=[1, 2, 3, "4"]), "expected four finite numbers"),
    "nan": (json.dumps(broken("annotations", 0, "bbox", value=[0, 0, float("nan"), 1])), "four finite"),
    "huge": (broken("annotations", 0, "bbox", value=[0, 0, 10**400, 1]), "four finite"),
    "bool in box": (broken("annotations", 0, "bbox", value=[0, 0, True, 1]), "four finite"),
    "list as image id": (broken("annotations", 0, "image_id", value=[1]), r"unknown image \[1\]"),
    "dict as category": (broken("annotations", 0, "category_id", value={}), "unknown category {}"),
    "null byte": (broken("images", 0, "file_name", value="a\0.jpg"), "leaves the image folder"),
    "drive": (broken("images", 0, "file_name", value="C:\\x.jpg"), "leaves the image folder"),
    "the folder itself": (broken("images", 0, "file_name", value="."), "leaves the image folder"),
    "negative": (broken("annotations", 0, "bbox", value=[0, 0, -1, 1]), "empty bbox"),
    "deep": ("[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named(tmp_path, fault) -> None:
    content, message = FAULTS[fault]
    write(tmp_path, content)
    with pytest.raises(AnnotationError, match=message):
        read_coco_folder(tmp_path)


def test_missing_files_and_captions(tmp_path) -> None:
    with pytest.raises(AnnotationError, match="does not exist"):
        read_coco_folder(tmp_path)
    write(tmp_path, GOOD)
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": [{"id": 1, "image_id": 1, "caption": 5}]}))
    with pytest.raises(AnnotationError, match="has no caption"):
        read_coco_folder(tmp_path)


@pytest.mark.parametrize("image_id", [None, [1], "1"])
def test_captions_without_an_image(tmp_path, image_id) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": [{"id": 1, "image_id": image_id, "caption": "a dog"}]}))
    with pytest.raises(AnnotationError, match="annotations id 1 has image_id"):
        read_captions(path)


def test_only_the_first_five_faults_are_shown(tmp_path) -> None:
    data = copy.deepcopy(GOOD)
    data["annotations"] += [{"id": 100 + i, "image_id": 77, "category_id": 3, "bbox": [0, 0, 1, 1]} for i in range(9)]
    write(tmp_path, data)
    with pytest.raises(AnnotationError, match="9 faults") as error:
        read_coco_folder(tmp_path)
    assert str(error.value).count("unknown image") == 5


@given(st.integers(0, 2**32 - 1))
def test_mutated_files_are_read_or_refused(tmp_path_factory, seed) -> None:
    import random

    rng = random.Random(seed)
    data = bytearray(json.dumps(GOOD).encode())
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    folder = tmp_path_factory.mktemp("m")
    (folder / "instances.json").write_bytes(bytes(data))
    with contextlib.suppress(AnnotationError):
        read_coco_folder(folder)
