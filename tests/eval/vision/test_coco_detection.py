"""COCO detection: both engines, run lengths, reader, whole runs with ground truth and with torchvision's detectors."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vision_folders import SIZE, coco, dump, edit, karpathy

from vislm.errors import AnnotationError, CheckpointError, UnknownName, UsageError
from vislm.eval.benchmarks import suspicions
from vislm.eval.checks import check_folder
from vislm.eval.running.runner import rescore, run
from vislm.eval.running.subjects import open_subject
from vislm.eval.specs import open_benchmark
from vislm.eval.vision import coco_detection, detector_models
from vislm.eval.vision.coco_annotations import COCO_IDS
from vislm.eval.vision.detection_metrics import average_precision
from vislm.eval.vision.detector import Detector
from vislm.eval.vision.model_spec import read_spec
from vislm.eval.vision.picture_f1 import overlap, picture_f1
from vislm.eval.vision.run_lengths import mask_fault, unpack
from vislm.golden.verify import verify_folder

mask_tools = pytest.importorskip("pycocotools.mask")
GOLDEN = Path(__file__).parents[2] / "golden" / "coco_detection" / "coco18.json"
INSTANCES = Path("annotations") / "instances_val2017.json"
ENGINES = ["pycocotools", pytest.param("faster", marks=pytest.mark.filterwarnings("default"))]


def require(engine: str) -> str:
    if engine == "faster":
        pytest.importorskip("faster_coco_eval")
    return engine


# --- the metric

CHANGES = [
    lambda d: d["results"]["bbox"]["stats"].__setitem__(0, 0.5),
    lambda d: d["results"]["bbox"]["stats"].__setitem__(11, 0.5),
    lambda d: d["results"]["segm"]["stats"].__setitem__(3, 0.5),
    lambda d: d["results"]["segm"]["per_category_AP"].update({"1": 0.5}),
    lambda d: d["results"]["bbox"]["per_category_AP"].pop("1"),
    lambda d: d["detections"][0].update(bbox=[0, 0, 5, 5]),
    lambda d: [a.update(iscrowd=0) for a in d["ground_truth"]["annotations"]],
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_any_change_to_the_fixture_is_noticed(number, tmp_path) -> None:
    data = json.loads(GOLDEN.read_text())
    CHANGES[number](data)
    dump(tmp_path / "case.json", data)
    (verdict,) = verify_folder(tmp_path)
    assert verdict.status == "fail"


def truth_as_detections(root: Path) -> list[dict[str, Any]]:
    """Return every object that is no crowd as a sure detection, with packed masks."""
    data = json.loads((root / INSTANCES).read_text())
    return [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 1.0,
            "segmentation": packed_polygons(a["segmentation"]),
        }
        for a in data["annotations"]
        if not a["iscrowd"]
    ]


def packed_polygons(polygons: Any) -> dict[str, Any]:
    mask = mask_tools.merge(mask_tools.frPyObjects(polygons, SIZE[1], SIZE[0]))
    return {"size": [int(v) for v in mask["size"]], "counts": mask["counts"].decode()}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_truth_has_an_ap_of_one_and_nothing_is_changed(engine, kind, tmp_path) -> None:
    require(engine)
    truth, found = json.loads((coco(tmp_path) / INSTANCES).read_text()), truth_as_detections(tmp_path)
    before = copy.deepcopy((truth, found))
    scores = average_precision(truth, found, kind, engine=engine)
    assert scores.stats["AP"] == pytest.approx(1.0)
    assert scores.stats["AR_100"] == pytest.approx(1.0)
    assert scores.stats["AP_large"] == -1.0
    assert scores.per_category == {1: pytest.approx(1.0), 3: pytest.approx(1.0)}
    assert (truth, found) == before
    none = average_precision(truth, [], kind, engine=engine)
    assert none.stats["AP"] == 0.0
    part = average_precision(truth, found[:2], kind, images=[0], engine=engine)  # only the first picture counts
    assert part.stats["AP"] == pytest.approx(1.0)


@pytest.mark.filterwarnings("default")
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6))
def test_both_engines_agree(seed) -> None:
    pytest.importorskip("faster_coco_eval")
    rng = random.Random(seed)
    data = json.loads(GOLDEN.read_text())
    found = [d for d in data["detections"] if rng.random() < 0.8]
    for detection in found:
        detection["score"] = round(rng.random(), 1)  # many ties
        detection["bbox"] = [v + rng.uniform(-6, 6) * (i < 2) for i, v in enumerate(detection["bbox"])]
        detection["category_id"] = rng.choice([detection["category_id"], 1, 12])  # 12 is none of COCO's
    for kind in ("bbox", "segm"):
        ours, theirs = (
            average_precision(data["ground_truth"], found, kind, engine=e) for e in ("pycocotools", "faster")
        )
        assert ours.stats == pytest.approx(theirs.stats, abs=1e-12)
        assert ours.per_category == pytest.approx(theirs.per_category, abs=1e-12)


def test_a_mask_is_as_large_as_itself_not_as_its_box() -> None:
    """A thin diagonal of 100 x 100 pixels: its box is large, the mask small."""
    polygon = [[0.0, 0.0, 2.0, 0.0, 100.0, 98.0, 100.0, 100.0, 98.0, 100.0, 0.0, 2.0]]
    mask = mask_tools.merge(mask_tools.frPyObjects(polygon, 200, 200))
    area = float(mask_tools.area(mask))
    packed = {"size": [200, 200], "counts": mask["counts"].decode()}
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 100], "area": area, "iscrowd": 0}
    truth = {
        "images": [{"id": 1, "width": 200, "height": 200}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [{**row, "segmentation": polygon}],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 100], "score": 0.9, "segmentation": packed}]
    # an unmatched mask counts among the small ones only by its own area
    found.append({**found[0], "score": 1.0, "segmentation": packed_box(150, 150, 40, 10), "bbox": [0, 0, 190, 190]})
    small = average_precision(truth, found, "segm").stats["AP_small"]
    assert area < 32**2
    assert small == pytest.approx(0.5, abs=0.01)


def packed_box(x: int, y: int, w: int, h: int) -> dict[str, Any]:
    dense = np.zeros((200, 200), np.uint8, order="F")
    dense[y : y + h, x : x + w] = 1
    mask = mask_tools.encode(dense)
    return {"size": [200, 200], "counts": mask["counts"].decode()}


def test_engines_by_name(tmp_path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'faster'"):
        open_benchmark("coco_detection:engine=fast", coco(tmp_path))


def test_f1_of_a_picture() -> None:
    objects = [{"category_id": 1, "bbox": [0, 0, 10, 10], "iscrowd": 0}]
    hit = {"category_id": 1, "bbox": [0, 0, 10, 9], "score": 0.9}
    assert picture_f1(objects, [hit]) == 1.0
    assert picture_f1(objects, [hit, {**hit, "score": 0.8}]) == pytest.approx(2 / 3)  # found twice
    assert picture_f1(objects, [{**hit, "category_id": 2}]) == 0.0
    assert picture_f1(objects, [{**hit, "score": 0.4}]) == 0.0
    assert picture_f1([], []) == 1.0
    crowd = [{"category_id": 1, "bbox": [0, 0, 50, 50], "iscrowd": 1}]
    assert picture_f1(crowd, [hit]) == 1.0
    assert picture_f1(crowd, [{**hit, "category_id": 2}]) == 0.0
    assert overlap([0, 0, 2, 2], [1, 1, 2, 2]) == pytest.approx(1 / 7)
    assert overlap([0, 0, 2, 2], [1, 1, 2, 2], crowd=True) == 0.25
    assert overlap([0, 0, 2, 2], [5, 5, 2, 2]) == 0.0


# --- run lengths


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_packed_run_lengths(height, width, seed) -> None:
    dense = np.random.default_rng(seed).random((height, width)) < np.random.default_rng(seed + 1).random()
    mask = mask_tools.encode(np.asfortranarray(dense.astype(np.uint8)))
    text = mask["counts"].decode()
    runs = unpack(text)
    assert runs is not None
    flat = np.repeat(np.arange(len(runs)) % 2, runs)
    assert np.array_equal(flat, dense.T.ravel())
    assert mask_fault({"size": [height, width], "counts": text}, width, height) is None


@pytest.mark.parametrize(
    "counts",
    ["", "0", "zzz", "é", "o" * 30, "PPPP", [1, 2], [-1, 1537], [1.0], None, ["1536"], "0" * 7 + "1", [True, 1535]],
)
def test_damaged_run_lengths_never_reach_the_scorer(counts) -> None:
    assert mask_fault({"size": [SIZE[1], SIZE[0]], "counts": counts}, *SIZE)


# --- reader


def _annotation(**values: Any):
    return lambda r: edit(r / INSTANCES, lambda d: d["annotations"][1].update(values))


def _image(**values: Any):
    return lambda r: edit(r / INSTANCES, lambda d: d["images"][1].update(values))


SPLIT_TWICE = "holds several instances files"
FAULTS = [
    (lambda r: (r / "val2017" / "000000000001.jpg").unlink(), "sample 1: the picture "),
    (lambda r: (r / "val2017" / "000000000001.jpg").write_bytes(b"\xff\xd8 no"), "sample 1: cannot use image"),
    (lambda r: (r / INSTANCES).unlink(), "holds no instances; expected instances.json"),
    (lambda r: (r / INSTANCES).write_text('{"images": ['), "is not valid JSON"),
    (lambda r: dump(r / INSTANCES, []), "holds a list at the top"),
    (lambda r: edit(r / INSTANCES, lambda d: d.pop("categories")), "'categories' is NoneType"),
    (lambda r: dump(r / "annotations" / "instances_train2017.json", {}), SPLIT_TWICE),
    (_annotation(id=1), "entry 2 (id 1): annotation id '1' appears twice"),
    (_annotation(id="2"), "id is '2'; expected a whole number"),
    (_annotation(image_id=77), "entry 2 (id 2): has the unknown image 77"),
    (_annotation(category_id=2), "has the unknown category 2"),
    (_annotation(bbox=[1, 2, 3]), "bbox is [1, 2, 3]"),
    (_annotation(bbox=[1, 2, 0, 3]), "finite and with an area"),
    (_annotation(bbox=[1, 2, 10**400, 3]), "finite and with an area"),
    (_annotation(bbox=[48, 2, 5, 5]), "lies outside the picture of 48 x 32 pixels"),
    (_annotation(area=None), "area is None"),
    (_annotation(area=-1), "area is -1"),
    (_annotation(iscrowd=2), "iscrowd is 2; expected 0 or 1"),
    (_annotation(segmentation=[]), "expected polygons"),
    (_annotation(segmentation=[[1, 2, 3, 4]]), "expected polygons of at least three points"),
    (_annotation(segmentation=[[1, 2, 3, 4, 5, 10**8]]), "expected points in or close to the picture"),
    (_annotation(segmentation={"size": [48, 32], "counts": [1536]}), "has size [48, 32]; expected [32, 48]"),
    (_annotation(segmentation={"size": [32, 48], "counts": [1535]}), "counts 1535 pixels; the picture has 1536"),
    (_annotation(segmentation={"size": [32, 48], "counts": "zzz"}), "segmentation has counts 'zzz'"),
    (_image(width=0), "(id 1): width is 0"),
    (_image(height="32"), "height is '32'"),
    (_image(file_name="../000000000001.jpg"), "names an image outside its folder"),
    (_image(file_name="000000000000.jpg"), "file_name '000000000000.jpg' appears twice"),
    (_image(id=0), "image id '0' appears twice"),
    (lambda r: edit(r / INSTANCES, lambda d: d["categories"][1].update(name="person")), "'person' appears twice"),
    (lambda r: edit(r / INSTANCES, lambda d: d["categories"][1].update(id=True)), "id is True; expected a whole"),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults_are_named(number, tmp_path) -> None:
    break_it, message = FAULTS[number]
    break_it(coco(tmp_path))
    assert any(message in fault for fault in check_folder("coco_detection", tmp_path, decode=True).faults)


def test_a_sound_folder_and_what_is_odd_about_it(tmp_path) -> None:
    report = check_folder("coco_detection", coco(tmp_path), decode=True)
    assert (report.samples, report.pictures, report.faults) == (4, 4, [])
    edit(tmp_path / INSTANCES, lambda d: d["images"][2].update(width=60))
    edit(tmp_path / INSTANCES, lambda d: d["annotations"][0].update(id=0))  # the scorers' word for "no match"
    task = open_benchmark("coco_detection", tmp_path)
    assert task.faults == []
    assert suspicions("coco_detection", task) == [
        "4 pictures with 9 annotations; the published file has 5000 with 36781",
        "3 categories that are not COCO's 80 (ids 1 to 90 with gaps)",
        "000000000002.jpg: (48, 32) pixels; the annotations say (60, 32)",
    ]
    with pytest.raises(UsageError, match="is not coco_detection"):
        coco_detection.suspicions(open_benchmark("retrieval", karpathy(tmp_path / "other")))


def test_the_ids_of_coco() -> None:
    assert len(COCO_IDS) == 80
    assert (COCO_IDS[0], COCO_IDS[11], COCO_IDS[-1]) == (1, 13, 90)


# --- whole runs


@pytest.mark.parametrize("engine", ENGINES)
def test_stored_detections(engine, tmp_path) -> None:
    require(engine)
    found = truth_as_detections(coco(tmp_path))
    dump(tmp_path / "found.json", [*found, {**found[0], "image_id": 99}])
    task = open_benchmark(f"coco_detection:engine={engine}", tmp_path)
    with open_subject(task.subject, str(tmp_path / "found.json")) as subject:
        results = run(task, subject, tmp_path / "out")
    assert results["metrics"]["box_AP"] == results["metrics"]["mask_AP"] == pytest.approx(1.0)
    assert results["score"]["mean"] == 1.0
    assert results["per_group"] == {name: {"box_AP": 1.0, "mask_AP": 1.0} for name in ("person", "car")}
    again = rescore(task, tmp_path / "out" / "predictions.jsonl")
    assert again["metrics"] == results["metrics"]
    boxes = [{k: v for k, v in d.items() if k != "segmentation"} for d in found[1:]]
    dump(tmp_path / "found.json", [*boxes, {**boxes[0], "category_id": 12}])
    with open_subject(task.subject, str(tmp_path / "found.json")) as subject:
        results = run(task, subject, tmp_path / "out2")
    assert "mask_AP" not in results["metrics"]
    assert 0.5 < results["metrics"]["box_AP"] < 1.0
    assert results["metrics"]["warnings"] == ["detections of categories that the annotations lack: [12]"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "holds a dict at the top"),
        ("[1]", "entry 1: is a int"),
        ('[{"image_id": 1}]', "lacks category_id, bbox, score"),
        ('[{"image_id": "1", "category_id": 1, "bbox": [], "score": 1}]', "image_id is '1'"),
    ],
)
def test_stored_detections_that_are_none(content, message, tmp_path) -> None:
    (tmp_path / "found.json").write_text(content)
    with pytest.raises(AnnotationError, match=message), open_subject("detector", str(tmp_path / "found.json")):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detections": None}, "'detections' is None"),
        ({"detections": [7]}, "detection 0: 7 has no whole number under 'category_id'"),
        ({"detections": [{"category_id": 1, "bbox": [0, 0, 1], "score": 1}]}, r"bbox is \[0, 0, 1\]"),
        ({"detections": [{"category_id": 1, "bbox": [0, 0, -1, 1], "score": 1}]}, "bbox is"),
        ({"detections": [{"category_id": 1, "bbox": [0, 0, 1, 1], "score": "1"}]}, "score is '1'"),
        ({"detections": [{"category_id": 1, "bbox": [0, 0, 1, 1], "score": float("nan")}]}, "score is nan"),
        (
            {"masks": True, "detections": [{"category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]},
            "segmentation has size None",
        ),
        (
            {
                "masks": True,
                "detections": [
                    {
                        "category_id": 1,
                        "bbox": [0, 0, 1, 1],
                        "score": 1,
                        "segmentation": {"size": [32, 48], "counts": [1536]},
                    }
                ],
            },
            "plain run lengths",
        ),
    ],
)
def test_rows_that_hold_something_else(change, message, tmp_path) -> None:
    task = open_benchmark("coco_detection", coco(tmp_path))
    with pytest.raises(AnnotationError, match=message):
        task.parse({"id": "1", "text": "", **change})


def test_masks_are_only_scored_where_the_truth_has_them(tmp_path) -> None:
    found = truth_as_detections(coco(tmp_path))
    dump(tmp_path / "found.json", found)
    edit(tmp_path / INSTANCES, lambda d: d["annotations"][0].pop("segmentation") and None)
    task = open_benchmark("coco_detection", tmp_path)
    with open_subject(task.subject, str(tmp_path / "found.json")) as subject:
        metrics = run(task, subject, tmp_path / "out")["metrics"]
    assert "mask_AP" not in metrics
    assert metrics["warnings"] == ["masks are not scored: some annotations have no segmentation"]


def test_no_pictures_is_a_warning(tmp_path) -> None:
    task = open_benchmark("coco_detection", coco(tmp_path))
    assert task.aggregate({})["warnings"] == ["no pictures"]
    assert task.groups({}) == {}


# --- detectors


class Fixed(torch.nn.Module):
    """Finds the same in every picture."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label, self.seen = label, []

    def forward(self, pictures):
        (picture,) = pictures
        self.seen.append(picture)
        masks = torch.zeros(1, 1, *picture.shape[1:])
        masks[0, 0, 3:15, 2:12] = 0.6
        masks[0, 0, 20:, :] = 0.5  # not above the threshold
        boxes = torch.tensor([[2.1, 3.0, 12.0, 15.0]])
        return [{"boxes": boxes, "labels": torch.tensor([self.label]), "scores": torch.tensor([0.7]), "masks": masks}]


def test_what_a_detector_finds_becomes_cocos_format(tmp_path) -> None:
    task, model = open_benchmark("coco_detection", coco(tmp_path)), Fixed(3)
    results = run(task, Detector(model, {"model": "fixed"}), tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a" / "predictions.jsonl").read_text().splitlines()]
    (found,) = rows[0]["detections"]
    assert (found["category_id"], found["bbox"], found["score"]) == (3, [2.1, 3.0, 9.9, 12.0], 0.7)
    runs = unpack(found["segmentation"]["counts"])
    dense = np.repeat(np.arange(len(runs)) % 2, runs).reshape(SIZE).T
    assert dense.sum() == 12 * 10
    assert dense[3:15, 2:12].all()
    assert {tuple(p.shape) for p in model.seen} == {(3, 32, 48)}
    assert max(float(p.max()) for p in model.seen) == 1.0
    assert results["per_group"]["car"]["box_AP"] == 0.0
    contiguous = Detector(Fixed(12), {"model": "fixed"}, labels="contiguous")
    run(task, contiguous, tmp_path / "b")
    row = json.loads((tmp_path / "b" / "predictions.jsonl").read_text().splitlines()[0])
    assert row["detections"][0]["category_id"] == 13
    with pytest.raises(UsageError, match="label 81"):
        run(task, Detector(Fixed(81), {"model": "fixed"}, labels="contiguous"), tmp_path / "c")
    with pytest.raises(UnknownName, match="numbering"):
        Detector(Fixed(1), {}, labels="voc")


MASK_RCNN = "maskrcnn@{}:backbone=mobilenetv3_small_050,min_size=64,max_size=96,num_classes=81,score_thresh=0.0"


@pytest.mark.slow
def test_mask_rcnn_on_a_backbone_of_timm(tmp_path) -> None:
    from safetensors.torch import save_file

    spec = read_spec(MASK_RCNN.format("random"), detector_models.OPTIONS, "COCO_V1")
    weights = tmp_path / "w.safetensors"
    save_file(detector_models.build(spec).state_dict(), weights)
    task = open_benchmark("coco_detection", coco(tmp_path, 2))
    with open_subject(task.subject, MASK_RCNN.format(weights)) as subject:
        one = run(task, subject, tmp_path / "one", batch_size=1)
        two = run(task, subject, tmp_path / "two", batch_size=2)
    assert one["metrics"] == two["metrics"]
    assert one["config"] == two["config"]
    assert one["metrics"]["n_detections"] > 50
    assert "mask_AP" in one["metrics"]
    assert one["config"]["labels"] == "contiguous"
    lines = (tmp_path / "one" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["detections"][0]["segmentation"]["size"] == [SIZE[1], SIZE[0]]
    save_file({"x": torch.zeros(1)}, weights)
    with pytest.raises(CheckpointError, match="does not fit MaskRCNN"):
        open_subject(task.subject, MASK_RCNN.format(weights)).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "retinanet@random:backbone=van_b0,min_size=64,max_size=96,score_thresh=0.0",
        "fasterrcnn@random:backbone=swin_tiny_patch4_window7_224,min_size=64,max_size=96,score_thresh=0.0",
        "fasterrcnn_mobilenet_v3_large_320_fpn@random:min_size=64,max_size=96,score_thresh=0.0,mean=0.5+0.5+0.5",
        "ssdlite320_mobilenet_v3_large@random:score_thresh=0.0",
    ],
)
def test_other_detectors(name, tmp_path) -> None:
    task = open_benchmark("coco_detection", coco(tmp_path, 2))
    with open_subject(task.subject, name) as subject:
        results = run(task, subject, tmp_path / "out", limit=1)
    assert "box_AP" in results["metrics"]
    assert "mask_AP" not in results["metrics"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("maskrcnn_resnet50_fpn", UsageError, "names no weights"),
        ("maskrcnn_resnet50_fnp@random", UnknownName, "did you mean 'maskrcnn_resnet50_fpn'"),
        ("maskrcnn@random", UsageError, "needs a backbone"),
        ("maskrcnn@random:backbone=nat_tini", UnknownName, "did you mean 'nat_tiny'"),
        (
            "maskrcnn@random:backbone=agent_deit_tiny",
            UsageError,
            r"maps of \(16,\) pixels a token; a detector needs \(4, 8",
        ),
        ("maskrcnn@random:backbone=vit_tiny_patch16_224", UsageError, "gives maps of|gives no feature maps"),
        ("retinanet_resnet50_fpn@random:backbone=nat_tiny", UsageError, "has a backbone"),
        ("ssd300_vgg16@random:min_size=100", UsageError, "leave min_size out"),
        ("maskrcnn@COCO_V1:backbone=mobilenetv3_small_050", UsageError, "no published weights"),
        ("fasterrcnn_mobilenet_v3_large_320_fpn@COCO", UnknownName, "COCO_V1"),
        ("retinanet@random:backbone=nat_tiny,labels=voc", UnknownName, "numbering"),
        ("missing.json", AnnotationError, "cannot read"),
        ("maskrcnn_resnet50_fpn@missing.safetensors", CheckpointError, "no such file"),
    ],
)
def test_models_that_cannot_be_had(name, error, message) -> None:
    with pytest.raises(error, match=message), open_subject("detector", name):
        pass


def test_methods_of_language_models_are_refused(tmp_path) -> None:
    for options in ({"prune": ["fastv:keep=0.5"]}, {"heads": ["pai"]}):
        with pytest.raises(UsageError, match="cannot act in a detector"), open_subject("detector", "x.json", **options):
            pass
    with pytest.raises(UsageError, match="float32"), open_subject("detector", "x.json", dtype="float16"):
        pass
