"""POPE's parsers and prompt suffixes, in Python and by text, stored with the run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from lmm_folders import Canned, dump
from lmm_folders import pope as folder

from vislm.errors import AnnotationError, UnknownName, UsageError
from vislm.eval.benchmarks import load_benchmark, read_options
from vislm.eval.prompts import SUFFIXES
from vislm.eval.questions.pope import suspicions
from vislm.eval.questions.pope_answers import PARSERS, parse
from vislm.eval.running.runner import run
from vislm.eval.specs import open_benchmark

ANSWERS = ["Yes", "NO", "I can't tell", "yes.", "maybe", "No, there is not", "yes or no"]


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_variant_is_asked_and_stored(parser, suffix, tmp_path) -> None:
    task = load_benchmark("pope", folder(tmp_path), parser=parser, suffix=suffix)
    canned = Canned({s.id: "Yes" if s.truth == "yes" else "No" for s in task.samples})
    results = run(task, canned, tmp_path / "out")
    assert results["metrics"]["mean"]["f1"] == 1.0
    assert (results["config"]["protocol.parser"], results["config"]["protocol.suffix"]) == (parser, suffix)
    assert all(prompt.endswith("?" + SUFFIXES[suffix]) for prompt in canned.prompts.values())
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    assert stored["protocol.suffix"] == suffix


@pytest.mark.parametrize(
    ("parser", "expected"),
    [
        ("official", ["yes", "yes", "yes", "yes", "yes", "no", "no"]),
        ("lmms-eval", ["yes", "no", "wrong", "wrong", "wrong", "wrong", "wrong"]),
        ("pai", ["yes", "no", "no", "yes", "dropped", "no", "no"]),
        ("vlmevalkit", ["yes", "no", "unknown", "yes", "unknown", "no", "unknown"]),
    ],
)
def test_the_parsers_disagree_as_documented(parser, expected) -> None:
    assert [parse(text, parser) for text in ANSWERS] == expected


def test_ids_do_not_depend_on_the_suffix(tmp_path) -> None:
    plain, short = (load_benchmark("pope", folder(tmp_path), suffix=s) for s in ("none", "short"))
    assert [s.id for s in plain.samples] == [s.id for s in short.samples]
    assert plain.groups({}) == {}


def test_by_text(tmp_path) -> None:
    assert read_options("pope", "parser=pai, suffix=short,seed=3") == {"parser": "pai", "suffix": "short", "seed": 3}
    with pytest.raises(UnknownName, match="did you mean 'parser'"):
        read_options("pope", "parsr=pai")
    with pytest.raises(UnknownName, match="POPE parser"):
        load_benchmark("pope", folder(tmp_path), parser="oficial")
    with pytest.raises(UnknownName, match="prompt suffix"):
        load_benchmark("pope", tmp_path, suffix="long")


def test_built_questions_have_variants_too(scenes) -> None:
    task = load_benchmark("pope", scenes, parser="pai", suffix="short", seed=1)
    assert task.protocol["questions"] == "scenes, seed 1"
    assert task.samples[0].prompt.endswith("word or phrase.")
    assert suspicions(task) == []


def _rows(number: int = 2, **extra: str) -> str:
    rows = [
        {"question_id": n + 1, "image": "a.jpg", "text": f"Is there a thing{n} in the image?", "label": label, **extra}
        for n, label in enumerate(["yes", "no"] * (number // 2))
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_llava_s_file_of_all_splits_brings_its_suffix(tmp_path) -> None:
    lines = [_rows(category=split).replace("image?", "image?\\nAnswer the question using a single word or phrase.")
             for split in ("random", "popular", "adversarial")]  # fmt: skip
    (tmp_path / "llava_pope_test.jsonl").write_text("".join(lines))
    for suffix in ("none", "short"):
        task = load_benchmark("pope", tmp_path, suffix=suffix)
        assert len(task.questions) == 6
        assert {q.split for q in task.questions} == {"random", "popular", "adversarial"}
        assert task.samples[0].prompt == "Is there a thing0 in the image?" + SUFFIXES["short"]
    with pytest.raises(UsageError, match="already end in the suffix 'short'; use suffix=none, not yes-no"):
        load_benchmark("pope", tmp_path, suffix="yes-no")


def test_one_split_alone(tmp_path) -> None:
    task = load_benchmark("pope", folder(tmp_path), split="popular")
    assert {q.split for q in task.questions} == {"popular"}
    assert task.protocol["split"] == "popular"
    assert suspicions(task) == []
    assert task.aggregate({s.id: {"id": s.id, "text": "no"} for s in task.samples}).keys() == {"popular", "mean"}
    with pytest.raises(UnknownName, match="did you mean 'popular'"):
        load_benchmark("pope", tmp_path, split="poplar")


def test_one_split_of_scenes_has_its_oracles(scenes) -> None:
    every, one = (load_benchmark("pope", scenes, split=s).aggregate({})["oracles"] for s in ("all", "random"))
    assert one == {"random": every["random"]}


def test_several_sets_in_a_folder(tmp_path) -> None:
    for name in ("coco", "aokvqa"):
        (tmp_path / f"{name}_pope_random.json").write_text(_rows())
    with pytest.raises(AnnotationError, match="several files of the split random"):
        load_benchmark("pope", tmp_path)
    task = load_benchmark("pope", tmp_path, files="aokvqa_*.json")
    assert task.protocol["questions"] == "official files aokvqa_pope_random.json"
    with pytest.raises(AnnotationError, match="expected gqa"):
        load_benchmark("pope", tmp_path, files="gqa*")


def test_packed_files_and_coco_s_image_folder(tmp_path) -> None:
    (tmp_path / "val2014").mkdir()
    (tmp_path / "coco_pope_popular.json.gz").write_bytes(gzip.compress(_rows().encode()))
    task = load_benchmark("pope", tmp_path)
    assert {q.split for q in task.questions} == {"popular"}
    assert task.samples[0].images == (tmp_path / "val2014" / "a.jpg",)


def _coco(root: Path) -> Path:
    names = ["person", "dog", "cat", "car", "bus", "cup", "bench"]
    boxes = [
        {"id": 10 * i + k, "image_id": i, "category_id": (i + k) % 7, "bbox": [0, 0, 1, 1]}
        for i in range(12)
        for k in range(3 if i else 1)
    ]
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(12)]
    categories = [{"id": i, "name": n} for i, n in enumerate(names)]
    dump(
        root / "annotations" / "instances_val2014.json",
        {"images": images, "categories": categories, "annotations": boxes},
    )
    return root


def test_questions_are_built_for_drawn_images(tmp_path) -> None:
    task = open_benchmark("pope:draw=5,seed=3", _coco(tmp_path))
    assert task.protocol["questions"] == "official algorithm, seed 3, 5 images drawn"
    assert len(task.questions) == 5 * 6 * 3
    assert task.samples[0].images[0].parent == tmp_path / "val2014"
    assert {q.image for q in task.questions} != {q.image for q in open_benchmark("pope:draw=5", tmp_path).questions}
    assert len(load_benchmark("pope", tmp_path).questions) == 11 * 6 * 3  # one image shows fewer than three objects
    with pytest.raises(UsageError, match="11 images show 3 or more objects; 12"):
        load_benchmark("pope", tmp_path, draw=12)


def test_sources(tmp_path, scenes) -> None:
    assert load_benchmark("pope", scenes, source="coco", draw=2).protocol["questions"].startswith("official algorithm")
    with pytest.raises(UsageError, match="use --limit"):
        load_benchmark("pope", folder(tmp_path), source="files", draw=2)
    with pytest.raises(UsageError, match="use --limit"):
        load_benchmark("pope", tmp_path, draw=2)
    with pytest.raises(UnknownName, match="source of POPE"):
        load_benchmark("pope", tmp_path, source="file")
    root = _coco(tmp_path / "coco")
    with pytest.raises(UsageError, match="was not made by vislm data scenes"):
        load_benchmark("pope", root, source="scenes")
    with pytest.raises(AnnotationError, match="holds no POPE questions"):
        load_benchmark("pope", root, source="files")
    with pytest.raises(AnnotationError, match="expected coco_pope"):
        load_benchmark("pope", root, files="coco_pope*")
    folder(root)  # published questions are taken before built ones
    assert load_benchmark("pope", root).protocol["questions"].startswith("official files")
    assert load_benchmark("pope", root, source="coco").protocol["questions"] == "official algorithm, seed 0"


def test_broken_rows_stop_or_are_listed(tmp_path) -> None:
    root = folder(tmp_path / "data")
    path = root / "coco_pope_random.json"
    path.write_text("{\n" + path.read_text().replace('"label": "no"', '"label": "perhaps"', 1))
    task = load_benchmark("pope", root)
    canned = Canned({s.id: "Yes" for s in task.samples})
    with pytest.raises(AnnotationError, match=r"2 broken rows: coco_pope_random\.json: line 1 is not JSON"):
        run(task, canned, tmp_path / "stop")
    results = run(task, canned, tmp_path / "skip", on_error="skip")
    assert [fault["error"].partition(": ")[0] for fault in results["broken"]] == ["coco_pope_random.json"] * 2
    assert results["metrics"]["random"]["n"] == 11
