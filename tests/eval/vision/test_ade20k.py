"""ADE20K: golden areas, reader, whole runs with finished maps and with a tiny SegFormer."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vision_folders import SIZE, ade20k, draw, dump, karpathy, labels, save_map

from vislm.errors import AnnotationError, CheckpointError, ImageError, UnknownName, UsageError
from vislm.eval.benchmarks import suspicions
from vislm.eval.checks import check_folder
from vislm.eval.running.runner import rescore, run
from vislm.eval.running.subjects import open_subject
from vislm.eval.specs import open_benchmark
from vislm.eval.vision import miou
from vislm.eval.vision.label_maps import packed_map, read_map, unpacked_map
from vislm.eval.vision.segmentation_models import scaled
from vislm.eval.vision.segmenter import Segmenter
from vislm.eval.vision.sliding import Windows
from vislm.golden.verify import verify_folder

GOLDEN = Path(__file__).parents[2] / "golden" / "miou" / "c8.json"
LABELS = Path("annotations") / "validation"
IMAGES = Path("images") / "validation"
FIRST = "ADE_val_00000001"


# --- the metric


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(mIoU=d["mIoU"] + 1e-5),
        lambda d: d.update(aAcc=d["aAcc"] - 1e-5),
        lambda d: d["IoU"].__setitem__(0, 0.5),
        lambda d: d["IoU"].__setitem__(7, 0.0),
        lambda d: d["Acc"].pop(),
        lambda d: d["area_union"].__setitem__(3, 336.0),
        lambda d: d["images"][0]["pred"][0].__setitem__(0, 5),
        lambda d: d["images"].pop(),
    ],
)
def test_any_change_to_the_fixture_is_noticed(change, tmp_path) -> None:
    data = json.loads(GOLDEN.read_text())
    change(data)
    dump(tmp_path / "case.json", data)
    (verdict,) = verify_folder(tmp_path)
    assert verdict.status == "fail"


maps = st.integers(1, 5).flatmap(
    lambda n: st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 3, 255]), st.integers(0, 3)), min_size=n * n, max_size=n * n
    ).map(lambda pairs: np.array(pairs).reshape(n, n, 2))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(maps, max_size=4))
def test_the_sum_over_pictures_is_the_whole(pictures) -> None:
    parts = [miou.sparse(miou.confusion(p[..., 0], p[..., 1], 4)) for p in pictures]
    assert json.loads(json.dumps(parts)) == parts
    matrix = miou.summed(parts, 4)
    flat = np.concatenate([p.reshape(-1, 2) for p in pictures]) if pictures else np.zeros((0, 2), int)
    truth, guess = flat[flat[:, 0] != 255].T
    ious = []
    for c in range(4):
        either = np.sum((truth == c) | (guess == c))
        if either:
            ious.append(np.sum((truth == c) & (guess == c)) / either)
        else:
            assert math.isnan(miou.per_class(matrix)["IoU"][c])
    scores = miou.scores(matrix)
    assert scores["mIoU"] == pytest.approx(np.mean(ious) if ious else 0.0)
    assert scores["aAcc"] == pytest.approx(np.mean(truth == guess) if truth.size else 0.0)


def test_maps_that_do_not_fit() -> None:
    zeros = np.zeros((2, 2), int)
    with pytest.raises(UsageError, match=r"\(2, 3\) for labels of \(2, 2\)"):
        miou.confusion(zeros, np.zeros((2, 3), int), 4)
    with pytest.raises(UsageError, match="a prediction holds class 0 or 4"):
        miou.confusion(zeros, np.array([[0, 4], [0, 0]]), 4)
    with pytest.raises(UsageError, match="a label holds class 0 or 4"):
        miou.confusion(np.array([[0, 4], [0, 0]]), zeros, 4)
    assert miou.confusion(np.full((2, 2), 255), zeros + 9, 4).sum() == 0  # where nothing counts, anything may be said


def test_a_fixture_whose_label_0_is_no_class(tmp_path) -> None:
    data = json.loads(GOLDEN.read_text())
    for image in data["images"]:
        image["label"] = [[255 if v == 255 else v + 1 for v in row] for row in image["label"]]
    data["images"][0]["label"][0] = [v if v != 255 else 0 for v in data["images"][0]["label"][0]]
    data["meta"]["kwargs"]["reduce_zero_label"] = True
    dump(tmp_path / "case.json", data)
    (verdict,) = verify_folder(tmp_path)
    assert verdict.status == "pass"


# --- maps as files


def test_a_map_keeps_its_classes_whatever_the_kind_of_file(tmp_path) -> None:
    classes = np.arange(24).reshape(4, 6)
    plain = Image.fromarray(classes.astype(np.uint8))
    palette = plain.copy()
    palette.putpalette([255 - i % 256 for i in range(768)])
    plain.save(tmp_path / "l.png")
    palette.save(tmp_path / "p.png")
    Image.fromarray(classes.astype(np.uint16)).save(tmp_path / "i16.png")
    for name in ("l", "p", "i16"):
        assert np.array_equal(read_map(tmp_path / f"{name}.png"), classes), name
    assert np.array_equal(unpacked_map(packed_map(classes), "x"), classes)


@pytest.mark.parametrize("text", [None, "%", "AAAA", ""])
def test_texts_that_are_no_map(text) -> None:
    with pytest.raises(ImageError, match="row 1"):
        unpacked_map(text, "row 1")


def test_files_that_are_no_map(tmp_path) -> None:
    for name, mode in (("rgb", "RGB"), ("rgba", "RGBA"), ("la", "LA")):
        Image.new(mode, (4, 4)).save(tmp_path / f"{name}.png")
        with pytest.raises(ImageError, match="has one channel"):
            read_map(tmp_path / f"{name}.png")
    Image.new("L", (4, 4)).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "gif.png")
    with pytest.raises(ImageError, match="is no map"):
        read_map(tmp_path / "gif.png")
    file = io.BytesIO()
    Image.new("L", (60000, 3)).save(file, "PNG")
    with pytest.raises(ImageError, match="exceed the limit"):
        read_map(file.getvalue(), "wide")
    data = bytearray((tmp_path / "rgb.png").read_bytes())
    with pytest.raises(ImageError):
        read_map(bytes(data[:40]), "torn")


# --- reader


def test_the_official_layout(tmp_path) -> None:
    task = open_benchmark("ade20k", ade20k(tmp_path / "ADEChallengeData2016").parent)
    assert [s.id for s in task.samples] == [f"ADE_val_0000000{n}" for n in (1, 2, 3)]
    assert task.protocol == {"split": "validation", "classes": 150, "reduce_zero_label": True, "n_images": 3}
    report = check_folder("ade20k", tmp_path, decode=True)
    assert (report.samples, report.pictures, report.faults) == (3, 3, [])
    assert suspicions("ade20k", task) == ["3 pictures; the published validation has 2000"]


def test_suspicions(tmp_path) -> None:
    (ade20k(tmp_path) / "objectInfo150.txt").unlink()
    for n in (1, 2, 3):
        save_map(tmp_path / LABELS / f"ADE_val_{n:08d}.png", labels(n).clip(0, 149))
    found = suspicions("ade20k", open_benchmark("ade20k", tmp_path))
    assert found[1:] == [
        "no objectInfo150.txt with 150 names: classes are shown by number",
        "the largest label is 149, not 150: is label 0 a class?",
    ]
    with pytest.raises(UsageError, match="is not ade20k"):
        from vislm.eval.vision.ade20k import suspicions as of_ade20k

        of_ade20k(open_benchmark("retrieval", karpathy(tmp_path / "other")))


def _map(change):
    def apply(root: Path) -> None:
        stored = labels(0)
        change(stored)
        save_map(root / LABELS / f"{FIRST}.png", stored)

    return apply


FAULTS = [
    (lambda r: (r / IMAGES / f"{FIRST}.jpg").unlink(), f"sample {FIRST}: the labels {FIRST}.png have no picture"),
    (lambda r: (r / LABELS / f"{FIRST}.png").unlink(), f"sample {FIRST}: {FIRST}.jpg has no labels"),
    (lambda r: (r / IMAGES / f"{FIRST}.jpg").write_bytes(b"\xff\xd8 no"), f"sample {FIRST}: cannot use image"),
    (lambda r: (r / LABELS / f"{FIRST}.png").write_bytes(b"\x89PNG no"), f"sample {FIRST}: cannot use image"),
    (lambda r: draw(r / IMAGES / f"{FIRST}.png", 1), f"{FIRST}.png and {FIRST}.jpg share their labels"),
    (lambda r: draw(r / IMAGES / f"{FIRST}.jpg", 1, (32, 48)), "has 32 x 48 pixels, its labels 48 x 32"),
    (_map(lambda m: m.__setitem__((0, 0), 151)), "holds the label 151; expected 1 to 150"),
    (lambda r: Image.new("RGB", SIZE).save(r / LABELS / f"{FIRST}.png"), "a map of classes has one channel"),
    (lambda r: (r / "images").rename(r / "pictures"), "holds no folder images/validation"),
    (lambda r: (r / "annotations").rename(r / "labels"), "holds no folder annotations/validation"),
    (lambda r: [p.unlink() for d in (IMAGES, LABELS) for p in (r / d).iterdir()], "hold no pictures with labels"),
    (lambda r: (r / "objectInfo150.txt").write_bytes(b"\xff\xfe\xff"), "cannot read"),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults_are_named(number, tmp_path) -> None:
    break_it, message = FAULTS[number]
    break_it(ade20k(tmp_path))
    assert any(message in fault for fault in check_folder("ade20k", tmp_path, decode=True).faults)


def test_options(tmp_path) -> None:
    ade20k(tmp_path)
    with pytest.raises(UsageError, match="classes=255"):
        open_benchmark("ade20k:classes=255", tmp_path)
    with pytest.raises(AnnotationError, match="images/training"):
        open_benchmark("ade20k:split=training", tmp_path)
    whole = open_benchmark("ade20k:classes=151,reduce_zero_label=false", tmp_path)
    assert whole.faults == []
    assert open_benchmark("ade20k:classes=9", tmp_path).faults[0].endswith("holds the label 150; expected 1 to 9")
    _map(lambda m: m.__setitem__((0, 0), 255))(tmp_path)  # counts as little as 0
    assert open_benchmark("ade20k", tmp_path).faults == []


# --- whole runs


def finished(root: Path, wrong: int = 0) -> Path:
    """Return a folder of maps that are right but for the ``wrong`` first rows; where nothing counts they say 0."""
    for number in range(3):
        classes = labels(number).astype(int) - 1
        classes[classes < 0] = 0
        classes[:wrong] = 149
        save_map(root / f"ADE_val_{number + 1:08d}.png", classes)
    return root


def test_finished_maps(tmp_path) -> None:
    task = open_benchmark("ade20k", ade20k(tmp_path))
    with open_subject(task.subject, str(finished(tmp_path / "right"))) as subject:
        results = run(task, subject, tmp_path / "out")
    assert results["metrics"] == {"aAcc": 1.0, "mIoU": 1.0, "mAcc": 1.0, "mDice": 1.0, "n": 3}
    assert results["per_group"] == {f"thing {c}": {"IoU": 1.0, "Acc": 1.0} for c in (0, 1, 6, 149)}
    with open_subject(task.subject, str(finished(tmp_path / "wrong", 16))) as subject:
        worse = run(task, subject, tmp_path / "worse", batch_size=2)
    matrix = np.zeros((150, 150))
    for number in range(3):
        stored, said = labels(number), read_map(tmp_path / "wrong" / f"ADE_val_{number + 1:08d}.png")
        np.add.at(matrix, (stored[stored > 0] - 1, said[stored > 0]), 1)
    assert worse["metrics"]["aAcc"] == pytest.approx(np.trace(matrix) / matrix.sum())
    row = json.loads((tmp_path / "worse" / "predictions.jsonl").read_text().splitlines()[0])
    assert sum(pixels for *_, pixels in row["answer"]) == row["values"]["pixels"]
    assert rescore(task, tmp_path / "worse" / "predictions.jsonl")["metrics"] == worse["metrics"]
    assert task.aggregate({})["warnings"] == ["no pictures"]


def test_maps_that_are_missing_or_wrong(tmp_path) -> None:
    task = open_benchmark("ade20k", ade20k(tmp_path))
    (finished(tmp_path / "maps") / f"{FIRST}.png").unlink()
    with open_subject(task.subject, str(tmp_path / "maps")) as subject:
        with pytest.raises(CheckpointError, match=f"no map {FIRST}"):
            run(task, subject, tmp_path / "a")
    for change, message in (
        (np.zeros((3, 3)), r"row ADE_val_00000001: a prediction of \(3, 3\)"),
        (np.full((SIZE[1], SIZE[0]), 150), "holds class 150 or 150; expected 0 to 149"),
    ):
        save_map(tmp_path / "maps" / f"{FIRST}.png", change)
        with (
            open_subject(task.subject, str(tmp_path / "maps")) as subject,
            pytest.raises(AnnotationError, match=message),
        ):
            run(task, subject, tmp_path / f"out{change.shape}")
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(CheckpointError, match=r"neither config\.json nor maps"),
        open_subject("segmenter", str(tmp_path / "empty")),
    ):
        pass


def test_a_run_goes_on_where_it_was_killed(tmp_path) -> None:
    task = open_benchmark("ade20k", ade20k(tmp_path))
    with open_subject(task.subject, str(finished(tmp_path / "maps", 8))) as subject:
        whole = run(task, subject, tmp_path / "a")
        lines = (tmp_path / "a" / "predictions.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "a" / "predictions.jsonl").write_bytes(lines[0] + lines[1][:30])
        assert run(task, subject, tmp_path / "a", batch_size=1)["metrics"] == whole["metrics"]
    assert (tmp_path / "a" / "predictions.jsonl").read_bytes().splitlines()[0] == lines[0].rstrip()
    assert unpacked_map(json.loads(lines[2])["map"], "x").shape == (SIZE[1], SIZE[0])
    assert base64.b64decode(json.loads(lines[2])["map"])[:4] == b"\x89PNG"


def test_any_module_can_be_evaluated(tmp_path) -> None:
    """A stand-in that calls bright pixels class 6 and answers at a quarter of the resolution."""

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(1, 150, pixels.shape[2] // 4, pixels.shape[3] // 4)
        logits[:, 6] = torch.nn.functional.avg_pool2d(pixels.mean(1), 4) - 0.5
        return logits

    def prepare(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255

    task = open_benchmark("ade20k", ade20k(tmp_path))
    results = run(task, Segmenter(forward, prepare, {"model": "stand-in"}), tmp_path / "out")
    assert 0.0 < results["metrics"]["aAcc"] < 1.0
    said = {c for row in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines() for c in _said(row)}
    assert said == {0, 6}
    with pytest.raises(UsageError, match="300 classes"):
        run(task, Segmenter(lambda x: torch.zeros(1, 300, 2, 2), prepare, {"model": "x"}), tmp_path / "b")


def _said(row: str) -> set[int]:
    return set(np.unique(unpacked_map(json.loads(row)["map"], "x")).tolist())


# --- windows


@pytest.mark.parametrize(
    ("height", "width", "crop", "stride"), [(10, 17, 6, 4), (5, 9, 9, 9), (12, 12, 4, 4), (3, 20, 7, 5)]
)
def test_windows_cover_a_picture_and_average(height, width, crop, stride) -> None:
    pixels, seen = torch.rand(1, 3, height, width), []

    def forward(part: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(part.shape[2:]))
        return part * 2

    found = Windows(crop, stride).logits(forward, pixels)
    torch.testing.assert_close(found, pixels * 2)
    assert set(seen) == {(min(crop, height), min(crop, width))}
    rows = max(0, math.ceil((height - crop) / stride)) + 1
    assert len(seen) == rows * (max(0, math.ceil((width - crop) / stride)) + 1)


def test_overlaps_are_means() -> None:
    calls = iter([1.0, 3.0])
    found = Windows(4, 2).logits(lambda part: torch.full((1, 1, 1, 1), next(calls)), torch.zeros(1, 3, 4, 6))
    assert found[0, 0, 0].tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    with pytest.raises(UsageError, match="1 <= stride <= crop"):
        Windows(4, 5)


def test_sizes() -> None:
    assert scaled((683, 512), 512, 2048) == (683, 512)
    assert scaled((300, 200), 512, 2048) == (768, 512)
    assert scaled((5000, 500), 512, 2048) == (2048, 205)
    assert scaled((100, 1), 512, 2048) == (2048, 20)


# --- transformers


@pytest.fixture(scope="module")
def segformer(tmp_path_factory) -> Path:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(0)
    config = SegformerConfig(
        num_labels=150, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8
    )
    folder = tmp_path_factory.mktemp("segformer")
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_segformer(segformer, tmp_path) -> None:
    task = open_benchmark("ade20k", ade20k(tmp_path))
    results = {}
    for name, options in (
        ("ratio", "size=64"),
        ("again", "size=64"),
        ("processor", "resize=processor"),
        ("slide", "size=64,mode=slide,crop=48,stride=32"),
        ("one window", "size=64,mode=slide,crop=200,stride=200"),
    ):
        with open_subject(task.subject, f"{segformer}:{options}") as subject:
            results[name] = run(task, subject, tmp_path / name, batch_size=1 + (name == "again"))
    with open_subject(task.subject, f"{segformer}@random:size=64") as subject:
        assert subject.fingerprint()["weights"] == "random"
    assert results["ratio"]["metrics"] == results["again"]["metrics"]
    assert results["ratio"]["config"] == results["again"]["config"]
    assert results["ratio"]["config"]["model"] == "SegformerForSemanticSegmentation"
    assert results["slide"]["config"]["windows.stride"] == 32
    texts = {name: _maps(tmp_path / name) for name in results}
    assert texts["ratio"] == texts["again"]
    assert texts["ratio"] != texts["processor"]
    assert texts["ratio"] != texts["slide"]


def _maps(folder: Path) -> list[str]:
    return [json.loads(line)["map"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("{}:resize=ratios", UnknownName, "did you mean 'ratio'"),
        ("{}:mode=sliding", UnknownName, "slide"),
        ("{}:crop=5", UsageError, "crop and stride go with mode=slide"),
        ("{}:resize=none,size=5", UsageError, "size and max_size go with resize=ratio"),
        ("{}:sizes=5", UnknownName, "did you mean 'size'"),
        ("segformer@random", UsageError, "expected a folder of transformers"),
        ("{}/broken", CheckpointError, "cannot read a segmentation model"),
    ],
)
def test_models_that_cannot_be_had(model, error, message, segformer) -> None:
    broken = segformer / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "config.json").write_text('{"model_type": "segformer"}')
    with pytest.raises(error, match=message), open_subject("segmenter", model.format(segformer)):
        pass


def test_methods_of_language_models_are_refused(segformer) -> None:
    with pytest.raises(UsageError, match="cannot act in a segmentation model"):
        with open_subject("segmenter", str(segformer), ["fastv:keep=0.5"]):
            pass
    with pytest.raises(UsageError, match="float32"), open_subject("segmenter", str(segformer), dtype="float16"):
        pass
