"""ImageNet and its variants: layouts, class indices, judging, faults."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from vision.class_folders import COLOURS, WNIDS, colour_folders, picture

from vislm.errors import AnnotationError, UnknownName, UsageError
from vislm.eval.checks import check_folder
from vislm.eval.protocol import Asked
from vislm.eval.running.runner import rescore, run
from vislm.eval.vision import imagenet
from vislm.eval.vision.class_lists import imagenet_classes
from vislm.eval.vision.ground_truth import val_name
from vislm.eval.vision.imagenet_variants import VARIANTS


class Canned:
    """Answers each picture with given classes."""

    def __init__(self, answers: dict[str, Sequence[str]]) -> None:
        self.answers = answers

    def fingerprint(self) -> dict[str, Any]:
        return {"model": "canned"}

    def respond(self, batch: Sequence[Asked], *, max_new_tokens: int) -> list[dict[str, Any]]:
        tops = [self.answers[asked.sample.id] for asked in batch]
        return [{"text": top[0], "top": list(top), "seconds": 0.001} for top in tops]


def val_folders(root: Path, indices: Sequence[int] = (0, 2, 999)) -> Path:
    for index in indices:
        picture(root / "val" / WNIDS[index] / val_name(index + 1), COLOURS["red"])
    return root


def val_flat(root: Path, count: int = 3) -> Path:
    for number in range(1, count + 1):
        picture(root / "val" / val_name(number), COLOURS["red"])
    return root


def test_class_lists() -> None:
    assert (WNIDS[0], WNIDS[999]) == ("n01440764", "n15075141")
    assert sorted(WNIDS) == list(WNIDS)
    for subset in "ar":
        among = imagenet_classes(subset).possible
        assert len(set(among)) == 200
        assert list(among) == sorted(among)
    assert WNIDS[imagenet_classes("a").possible[0]] == "n01498041"


def test_a_whole_run(tmp_path) -> None:
    task = imagenet.load(val_folders(tmp_path))
    assert [s.truth for s in task.samples] == [[WNIDS[0]], [WNIDS[2]], [WNIDS[999]]]
    ids = [s.id for s in task.samples]
    answers = dict(zip(ids, [WNIDS[:5], WNIDS[:5], WNIDS[:5]], strict=True))
    results = run(task, Canned(answers), tmp_path / "out")
    assert results["metrics"]["top1"] == pytest.approx(100 / 3)
    assert results["metrics"]["top5"] == pytest.approx(200 / 3)
    assert results["score"]["mean"] == pytest.approx(1 / 3)
    assert results["config"]["protocol.variant"] == "val"
    assert rescore(task, tmp_path / "out" / "predictions.jsonl")["metrics"] == results["metrics"]


def test_only_the_first_five_count(tmp_path) -> None:
    task = imagenet.load(val_folders(tmp_path, [7]))
    row = {"id": task.samples[0].id, "text": WNIDS[0], "top": [*WNIDS[:5], WNIDS[7]]}
    assert task.parse(row).values == {"top1": 0.0, "top5": 0.0}
    assert task.parse({"id": row["id"], "text": WNIDS[7]}).values == {"top1": 100.0, "top5": 100.0}


def test_classes_count_alike_in_the_mean_over_classes(tmp_path) -> None:
    for number in range(3):
        picture(tmp_path / "val" / WNIDS[0] / f"{number}.JPEG", COLOURS["red"])
    picture(tmp_path / "val" / WNIDS[1] / "0.JPEG", COLOURS["red"])
    task = imagenet.load(tmp_path)
    rows = {s.id: {"id": s.id, "text": WNIDS[0]} for s in task.samples}
    assert task.aggregate(rows)["top1"] == pytest.approx(75.0)
    assert task.aggregate(rows)["mean_per_class"] == pytest.approx(50.0)
    assert task.aggregate({})["warnings"]


def test_v2_folders_are_numbers(tmp_path) -> None:
    for number in (0, 2, 10, 100, 999):
        picture(tmp_path / "imagenetv2-matched-frequency-format-val" / str(number) / "x.jpeg", COLOURS["red"])
    task = imagenet.load(tmp_path, variant="v2")
    assert [p.labels for p in task.pictures] == [(0,), (2,), (10,), (100,), (999,)]
    assert [s.truth for s in task.samples] == [[WNIDS[n]] for n in (0, 2, 10, 100, 999)]
    assert imagenet.load(tmp_path / "imagenetv2-matched-frequency-format-val", variant="v2").pictures == task.pictures


def test_real_has_label_sets_and_leaves_out_empty_ones(tmp_path) -> None:
    labels: list[list[int]] = [[] for _ in range(50_000)]
    labels[0], labels[2] = [4, 7], [999]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    task = imagenet.load(val_folders(tmp_path, [0, 1, 2]), variant="real")
    assert [s.truth for s in task.samples] == [[WNIDS[4], WNIDS[7]], [WNIDS[999]]]
    first = task.samples[0].id
    assert task.parse({"id": first, "text": WNIDS[7]}).score == 1.0
    assert task.parse({"id": first, "text": WNIDS[0]}).score == 0.0
    assert task.faults == []


def test_timms_copy_of_the_real_labels(tmp_path) -> None:
    """The first validation picture has no label in ReaL, the second two."""
    task = imagenet.load(val_folders(tmp_path, [0, 1]), variant="real")
    assert [p.labels for p in task.pictures] == [(970, 795)]


def test_a_and_r_have_200_classes(tmp_path) -> None:
    among = imagenet_classes("a").possible
    picture(tmp_path / "imagenet-a" / WNIDS[among[3]] / "0.jpg", COLOURS["red"])
    picture(tmp_path / "imagenet-a" / WNIDS[0] / "0.jpg", COLOURS["red"])
    task = imagenet.load(tmp_path, variant="a")
    assert [p.labels for p in task.pictures] == [(among[3],)]
    assert task.samples[0].classes.possible == among
    assert task.protocol["classes"] == 200
    assert task.faults[0].endswith("is a class of ImageNet, but none of the 200 of this variant")


GROUND_TRUTH: list[tuple[str, str]] = [
    ("LOC_val_solution.csv", "ImageId,PredictionString\n{0[0]},{1[9]} 1 2 3 4 {1[9]} 5 6 7 8\n{0[1]},{1[0]} 1 2 3 4\n"),
    ("imagenet_2012_validation_synset_labels.txt", "{1[9]}\n{1[0]}\n"),
    ("val.txt", "{0[0]}.JPEG 9\n{0[1]}.JPEG 0\n"),
    ("val.txt", "{0[0]}.JPEG {1[9]}\n{0[1]}.JPEG {1[0]}\n"),
]


@pytest.mark.parametrize(("file", "text"), GROUND_TRUTH)
def test_flat_pictures_with_a_list(file, text, tmp_path) -> None:
    names = [val_name(n).removesuffix(".JPEG") for n in (1, 2)]
    (tmp_path / file).write_text(text.format(names, WNIDS))
    task = imagenet.load(val_flat(tmp_path, 2))
    assert [(p.id, p.labels) for p in task.pictures] == [(val_name(1), (9,)), (val_name(2), (0,))]
    assert task.faults == []
    assert task.protocol["labels"] == file


def test_the_kit_has_numbers_of_its_own(tmp_path) -> None:
    io = pytest.importorskip("scipy.io")
    import numpy as np

    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    synsets = np.array([(1, WNIDS[500], 0), (2, WNIDS[3], 0), (3, "n00000001", 2)], dtype=kind)
    folder = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n3\n")
    val_flat(tmp_path)
    with pytest.raises(AnnotationError, match="numbers classes in the development kit's own order"):
        imagenet.load(tmp_path)
    io.savemat(folder / "meta.mat", {"synsets": synsets})
    task = imagenet.load(tmp_path)
    assert [p.labels for p in task.pictures] == [(3,), (500,)]
    assert any("line 3: class '3'; expected a number that meta.mat names" in fault for fault in task.faults)
    (folder / "meta.mat").write_bytes(b"nothing")
    with pytest.raises(AnnotationError, match=r"cannot read .*meta\.mat"):
        imagenet.load(tmp_path)


def test_classes_of_your_own(tmp_path) -> None:
    colour_folders(tmp_path, "test", 2)
    (tmp_path / "classes.txt").write_text("white\nred\tdeep red\nblue\n")
    task = imagenet.load(tmp_path, classes="classes.txt")
    assert [s.truth for s in task.samples] == [[n] for n in ("white", "white", "red", "red", "blue", "blue")]
    assert task.classes.texts == ("white", "deep red", "blue")
    assert [fault.split(": ")[1] for fault in task.faults] == ["is none of the 3 classes"]


def _write(path: str, content: str) -> Callable[[Path], object]:
    def apply(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)

    return apply


def _real(place: int, value: object) -> Callable[[Path], object]:
    labels: list[object] = [[1]] * 50_000
    labels[place] = value
    return _write("real.json", json.dumps(labels))


FIRST = f"val/{WNIDS[0]}"
FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("imagenet", _write("val/n99999999/x.JPEG", ""), "n99999999: is none of the 1000 classes"),
    ("imagenet", _write(f"{FIRST}/notes.txt", ""), "notes.txt: no picture in a class folder"),
    ("imagenet", lambda r: (r / FIRST / "more").mkdir(), "more: a folder in a class folder"),
    ("imagenet", lambda r: (r / "val" / WNIDS[5]).mkdir(), f"{WNIDS[5]}: holds no pictures"),
    ("imagenet", _write(f"{FIRST}/x.JPEG", "no picture"), "x.JPEG: not an image"),
    ("imagenet:variant=v2", _write("007a/x.jpeg", ""), "007a: is none of V2's folders 0 to 999"),
    ("imagenet:variant=v2", _write("1000/x.jpeg", ""), "1000: is none of V2's folders 0 to 999"),
    ("imagenet:variant=v2", lambda r: (picture(r / "7/x.png", (0, 0, 0)), picture(r / "07/x.png", (0, 0, 0))), "same"),
    ("imagenet:variant=r", _write("imagenet-r/n01443537/README.txt", ""), "README.txt: no picture"),
    ("imagenet:variant=real", _write(f"{FIRST}/x.JPEG", ""), "x.JPEG: no validation picture's name"),
    ("imagenet:variant=real", _real(0, 3), "ReaL's entry 00000001 is 3; expected a list of classes"),
    ("imagenet:variant=real", _real(0, [1000]), "class is 1000; expected a whole number from 0 to 999"),
    ("imagenet:variant=real", _write("real.json", "[[1]]"), "holds 1 label sets; expected 50000"),
    ("imagenet:variant=real", _write("real.json", "{}"), "expected a list"),
]


@pytest.mark.parametrize(("name", "damage", "message"), FAULTS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FAULTS)])
def test_faults_are_found_and_named(name, damage, message, tmp_path) -> None:
    if "v2" not in name:
        val_folders(tmp_path)
    damage(tmp_path)
    faults = check_folder(name, tmp_path, decode=True).faults
    assert any(message in fault for fault in faults), faults


FLAT_FAULTS: list[tuple[str, str, str]] = [
    ("val.txt", f"{val_name(1)} 1000\n", "line 1: class '1000'; expected 0 to 999"),
    ("val.txt", f"{val_name(1)} n1\n", "line 1: 'n1' is none of the 1000 synset ids"),
    ("val.txt", f"{val_name(1)} 1\n{val_name(1)} 1\n", "line 2: 'ILSVRC2012_val_00000001.JPEG' appears twice"),
    ("val.txt", f"{val_name(1)}\n", "line 1: '' is none"),
    ("val.txt", f"{val_name(1)} 1\n", "val.txt does not name it"),
    ("val.txt", f"{val_name(4)} 1\n", "00000004.JPEG is missing"),
    ("val.txt", "../x.JPEG 1\n", "names an image outside its folder"),
    ("LOC_val_solution.csv", "ImageId,PredictionString\na\n", "line 2: '' is none"),
    ("LOC_val_solution.csv", "ImageId,PredictionString\n" + "x" * 200_000, "LOC_val_solution.csv is no table"),
    ("imagenet_2012_validation_synset_labels.txt", "n1\n", "line 1: 'n1' is none"),
]


@pytest.mark.parametrize(("file", "text", "message"), FLAT_FAULTS)
def test_faults_of_lists(file, text, message, tmp_path) -> None:
    val_flat(tmp_path)
    (tmp_path / file).write_text(text)
    faults = check_folder("imagenet", tmp_path).faults
    assert any(message in fault for fault in faults), faults


def test_layouts_that_are_none(tmp_path) -> None:
    with pytest.raises(UsageError, match="not a folder"):
        imagenet.load(tmp_path / "nowhere")
    with pytest.raises(AnnotationError, match="holds no class folders"):
        imagenet.load(tmp_path)
    with pytest.raises(AnnotationError, match=r"holds no list of the classes .* expected LOC_val_solution\.csv or"):
        imagenet.load(val_flat(tmp_path))
    with pytest.raises(UnknownName, match="did you mean 'sketch'"):
        imagenet.load(tmp_path, variant="sketches")
    with pytest.raises(UsageError, match=r"classes=none\.txt: no such file"):
        imagenet.load(tmp_path, classes="none.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a\na\n", "names a class twice: 'a'"), ("a\n", "1 classes"), ("a\n\nb\n", "line 2: expected")],
)
def test_bad_class_files(text, message, tmp_path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(AnnotationError, match=message):
        imagenet.load(tmp_path, classes="classes.txt")


def test_what_is_unusual_is_no_fault(tmp_path) -> None:
    report = check_folder("imagenet", val_folders(tmp_path))
    assert report.faults == []
    assert report.suspicions == [
        "3 pictures to score; officially 50000",
        f"997 of 1000 classes have no picture, first {', '.join(WNIDS[i] for i in (1, 3, 4, 5, 6))}",
        f"3 classes do not have 50 pictures, first {WNIDS[0]}, {WNIDS[2]}, {WNIDS[999]}",
    ]
    assert {name: v.pictures for name, v in VARIANTS.items()} == {
        "val": 50_000,
        "real": 46_837,
        "v2": 10_000,
        "a": 7_500,
        "r": 30_000,
        "sketch": 50_889,
    }


def test_reading_needs_no_torch(tmp_path) -> None:
    import subprocess

    val_folders(tmp_path)
    code = (
        "import sys; from vislm.eval.checks import check_folder; "
        f"print(check_folder('imagenet', {str(tmp_path)!r}).samples, 'torch' in sys.modules, 'timm' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["3", "False", "False"]
