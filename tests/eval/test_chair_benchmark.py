"""Where CHAIR's pictures and truth come from, and what a run states about them."""

from __future__ import annotations

import shutil

import pytest
from lmm_folders import CAPTIONS, Canned, chair_table, draw, dump, edit
from lmm_folders import chair as folder

from vislm.errors import AnnotationError, UnknownName, UsageError
from vislm.eval.benchmarks import load_benchmark
from vislm.eval.checks import check_folder
from vislm.eval.running.runner import run
from vislm.eval.specs import open_benchmark


def test_annotations_and_the_official_layout_agree(tmp_path) -> None:
    plain = folder(tmp_path / "plain")
    official = tmp_path / "official"
    (official / "annotations").mkdir(parents=True)
    for name in ("instances", "captions"):
        shutil.copy(plain / f"{name}.json", official / "annotations" / f"{name}_val2014.json")
    shutil.copytree(plain / "images", official / "val2014")
    a, b = load_benchmark("chair", plain), load_benchmark("chair", official)
    assert a.truth == b.truth
    assert a.protocol == b.protocol
    assert a.protocol["truth"] == "instances and captions"
    assert "cat" in a.truth["12.jpg"]  # only people's captions speak of it
    assert all(sample.images[0].is_file() for sample in b.samples)
    moved = official.rename(tmp_path / "moved")
    for path in [*moved.glob("annotations/*")]:
        path.rename(path.with_name(path.name.replace("val2014", "val2017")))
    (moved / "val2014").rename(moved / "val2017")
    assert open_benchmark("chair:coco=val2017", moved).truth == a.truth


def test_the_object_table_with_the_pictures_that_are_there(tmp_path) -> None:
    task = load_benchmark("chair", chair_table(tmp_path))
    names = [f"COCO_val2014_{i:012d}.jpg" for i in (11, 12)]
    assert task.truth == {names[0]: {"person"}, names[1]: {"person", "car"}}
    assert (task.max_new_tokens, task.protocol["truth"]) == (512, "object table chair_ground_truth_pattern2014")
    results = run(task, Canned({names[0]: "A man and a dog.", names[1]: "A car."}), tmp_path / "out")
    assert results["metrics"]["CHAIR_i"] == pytest.approx(1 / 3)
    assert results["metrics"]["Recall"] == pytest.approx(2 / 3)
    draw(tmp_path / "val2014" / "COCO_val2014_000000000099.jpg")
    assert "image 99 is not in" in check_folder("chair", tmp_path).faults[0]


@pytest.mark.parametrize(
    "content", ["13\n11\n", "[13, 11]", '["13", "11"]', '{"image_id": 13, "caption": "x"}\n{"image_id": 11}\n']
)
def test_a_list_of_images_is_kept_in_its_order(tmp_path, content) -> None:
    root = chair_table(tmp_path)
    (root / "ids.txt").write_text(content)
    report = check_folder("chair:ids=ids.txt", root)
    assert report.samples == 2
    assert [fault.split()[1] for fault in report.faults] == ["COCO_val2014_000000000013.jpg:"]  # it does not lie there
    assert list(load_benchmark("chair", root, ids="ids.txt").paths)[1] == "COCO_val2014_000000000011.jpg"


def test_faults_of_a_list_are_named(tmp_path) -> None:
    root = chair_table(tmp_path)
    (root / "ids.txt").write_text("11\n77\n11\nCOCO_val2014_000000000012.jpg\n{broken\n")
    report = check_folder("chair:ids=ids.txt", root)
    assert report.faults == [
        "ids.txt: entry 2: '77' is no known image",
        "ids.txt: entry 3: image '11' appears twice",
        "ids.txt: entry 5: '{broken' is no known image",
    ]
    assert report.samples == 2
    with pytest.raises(AnnotationError, match="holds no list of images"):
        load_benchmark("chair", root, ids="other.txt")


def test_drawing(tmp_path) -> None:
    root = folder(tmp_path)
    drawn = [list(load_benchmark("chair", root, draw=2, seed=seed).paths) for seed in range(8)]
    assert {len(names) for names in drawn} == {2}
    assert len({tuple(names) for names in drawn}) > 1
    assert drawn[3] == list(load_benchmark("chair", root, draw=2, seed=3).paths)
    for wrong in (0, 4):
        with pytest.raises(UsageError, match="expected 1 to 3"):
            load_benchmark("chair", root, draw=wrong)


def test_options_are_stated(tmp_path, scenes) -> None:
    task = open_benchmark("chair:prompt=Say what you see., max_new_tokens=64", folder(tmp_path))
    assert task.samples[0].prompt == "Say what you see."
    assert (task.max_new_tokens, task.protocol["max_new_tokens"]) == (64, 64)
    assert (load_benchmark("chair", scenes).prompt, load_benchmark("chair", scenes).max_new_tokens) == (
        "Describe the image.",
        64,
    )
    with pytest.raises(UsageError, match="max_new_tokens=0"):
        load_benchmark("chair", tmp_path, max_new_tokens=0)
    with pytest.raises(UnknownName, match="source of CHAIR's truth"):
        load_benchmark("chair", tmp_path, source="tabel")
    with pytest.raises(AnnotationError, match="must hold one object table"):
        load_benchmark("chair", tmp_path, source="table")


def test_broken_rows_stop_or_are_listed(tmp_path) -> None:
    root = folder(tmp_path / "data")
    edit(root / "captions.json", lambda d: d["annotations"][0].pop("caption") and None)
    task = load_benchmark("chair", root)
    canned = Canned({f"{i}.jpg": "A dog." for i in CAPTIONS})
    with pytest.raises(AnnotationError, match=r"2 broken rows: captions\.json: annotations id 1 has no caption"):
        run(task, canned, tmp_path / "stop")
    results = run(task, canned, tmp_path / "skip", on_error="skip")
    assert results["n"] == 2
    assert [fault["error"].partition(":")[0] for fault in results["broken"]] == ["captions.json", "instances.json"]
    assert "image 11 (11.jpg) is left out" in results["broken"][1]["error"]


def test_words_of_other_categories(tmp_path) -> None:
    root = folder(tmp_path)
    edit(root / "instances.json", lambda d: d["categories"][0].update(name="gizmo"))
    task = load_benchmark("chair", root)
    assert task.vocabulary.objects == ("gizmo", "dog", "cat", "horse")
    assert "gizmo" in {o for shown in task.truth.values() for o in shown}
    dump(root / "instances.json", {"images": [], "categories": [], "annotations": []})
    with pytest.raises(AnnotationError, match="holds no images"):
        load_benchmark("chair", root)
