"""``vislm data check``: sound folders pass; every kind of fault is found and named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lmm_folders import FOLDERS, dump, edit, mmbench, mmbench_rows

from vislm.errors import UnknownName, UsageError
from vislm.eval.benchmarks import LMM_BENCHMARKS
from vislm.eval.checks import check_folder


def test_every_benchmark_has_a_folder_here() -> None:
    assert FOLDERS.keys() == LMM_BENCHMARKS.keys()


@pytest.mark.parametrize("name", FOLDERS)
def test_sound_folders(name, tmp_path) -> None:
    report = check_folder(name, FOLDERS[name](tmp_path), decode=True)
    assert report.faults == []
    assert report.samples > 1
    assert report.pictures > 1


def _lines(path: Path, change: Callable[[list[str]], None]) -> None:
    lines = path.read_text().split("\n")
    change(lines)
    path.write_text("\n".join(lines))


def _bare(root: Path) -> None:
    """Take everything away that says what picture 12 shows."""
    for file in (INSTANCES, CAPTIONS):
        edit(root / file, lambda d: d.update(annotations=[a for a in d["annotations"] if a["image_id"] != 12]))


def _pope(root: Path, **values: object) -> None:
    path = root / "coco_pope_random.json"
    _lines(path, lambda lines: lines.__setitem__(2, json.dumps({**json.loads(lines[2]), **values})))


def _mmbench(root: Path, column: int, value: str) -> None:
    rows = mmbench_rows()
    rows[1][column] = value
    mmbench(root, rows)


def _entry(file: str, key: str | None, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the second row of a JSON file, of the list under ``key`` or of the file itself."""

    def apply(root: Path) -> None:
        edit(root / file, lambda data: change((data[key] if key else data)[1]) and None)

    return apply


def _remove(file: str) -> Callable[[Path], None]:
    return lambda root: (root / file).unlink()


def _write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / file).write_bytes(content)


def _twice(file: str, key: str | None) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        edit(root / file, lambda data: (data[key] if key else data).append((data[key] if key else data)[0]))

    return apply


INSTANCES, CAPTIONS = "instances.json", "captions.json"
AMBER, QUERY = "data/annotations.json", "data/query/query_discriminative.json"
TEXTVQA, OCR = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json"
VQA_Q, VQA_A = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
GQA = "questions1.2/testdev_balanced_questions.json"
COCO, KARPATHY = "annotations/captions_val2014.json", "coco_captions:split=karpathy-test"

FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    # pictures
    ("pope", _remove("images/b.jpg"), "sample b.jpg|Is there a thing0 in the image?: the picture "),
    ("pope", _write("images/b.jpg", b"\xff\xd8\xff nothing"), "b.jpg: "),
    ("mme", _remove("existence/001.png"), "existence/001.txt: no picture 001 with it"),
    ("gqa", _remove("images/n2.jpg"), "sample 202: the picture "),
    # whole files
    ("amber", _remove(AMBER), "holds no AMBER annotations; expected annotations.json"),
    ("textvqa", _remove(TEXTVQA), "holds no TextVQA questions; expected TextVQA_0.5.1_val.json"),
    ("vqav2", _remove(VQA_A), "holds no VQAv2 annotations"),
    ("vizwiz", _write("Annotations/val.json", b'[{"image": '), "val.json is not valid JSON"),
    ("vizwiz", _write("Annotations/val.json", b"{}"), "holds a dict at the top; expected a list"),
    ("vizwiz", _write("Annotations/val.json", b"\xff\xfe\x00"), "cannot read"),
    ("vizwiz", _write("Annotations/val.json", b"[" * 100_000), "is not valid JSON"),
    ("vizwiz", _write("Annotations/val.json", b"[]"), "nothing to ask is left"),
    ("gqa", _write(GQA, b'{"1": {}, "1": {}}'), "the key '1' appears twice"),
    ("gqa", _write(GQA, b'{"1": NaN}'), "NaN is not a number of JSON"),
    ("vqav2", lambda root: dump(root / VQA_Q, {"question": []}), "'questions' is NoneType; expected a list"),
    ("amber", lambda root: (root / AMBER).rename(root / f"{AMBER}.gz"), "annotations.json.gz"),
    # POPE
    ("pope", lambda root: _pope(root, label="maybe"), "entry 3: label 'maybe'"),
    ("pope", lambda root: _pope(root, image="../b.jpg"), "image '../b.jpg' is not a file name below the image folder"),
    ("pope", lambda root: _pope(root, question_id=1), "question_id 1 is not unique"),
    ("pope", lambda root: _pope(root, label="no"), "is labelled both yes and no"),
    ("pope", lambda root: _lines(root / "coco_pope_popular.json", lambda x: x.insert(1, "{")), "line 2 is not JSON"),
    (
        "pope",
        lambda root: _lines(root / "coco_pope_popular.json", lambda x: x.insert(0, "{}")),
        "entry 1 has no 'image'",
    ),
    ("pope", lambda root: (root / "seem_pope_random.json").write_text(""), "several files of the split random"),
    ("pope", lambda root: [p.unlink() for p in root.glob("*.json")], "holds no POPE questions; expected coco_pope_"),
    # CHAIR
    ("chair", _remove("images/12.jpg"), "sample 12.jpg: the picture "),
    ("chair", _remove(INSTANCES), "does not exist; a COCO-format folder holds instances.json"),
    ("chair", _write(INSTANCES, b"[]"), "holds a list"),
    (
        "chair",
        lambda r: edit(r / INSTANCES, lambda d: d.pop("images") and None),
        "'images' is NoneType, expected a list",
    ),
    ("chair", _twice(INSTANCES, "images"), "images[3]: id 11 appears twice"),
    ("chair", _entry(INSTANCES, "images", lambda row: row.update(file_name="../x")), "leaves the image folder: '../x'"),
    ("chair", _entry(INSTANCES, "images", lambda row: row.pop("id")), "images[1] has no integer id"),
    ("chair", _entry(INSTANCES, "annotations", lambda row: row.update(category_id=9)), "111 has unknown category 9"),
    ("chair", _entry(INSTANCES, "annotations", lambda row: row.update(category_id=9)), "image 11 (11.jpg) is left out"),
    ("chair", _entry(INSTANCES, "annotations", lambda row: row.update(image_id=9)), "111 is about unknown image 9"),
    ("chair", _entry(INSTANCES, "annotations", lambda row: row.update(bbox=[0, 0, -1, 2])), "has an empty bbox"),
    ("chair", _entry(INSTANCES, "annotations", lambda row: row.update(bbox=[1, 2])), "expected four finite numbers"),
    ("chair", _entry(INSTANCES, "categories", lambda row: row.pop("name")), "categories id 2 has no name"),
    (
        "chair",
        _entry(CAPTIONS, "annotations", lambda row: row.pop("caption")),
        "annotations id 2 has no caption",
    ),
    # AMBER
    ("amber", lambda r: edit(r / AMBER, lambda d: d[2].update(truth="perhaps")), "entry 3 (id 3): truth is 'perhaps'"),
    ("amber", _twice(AMBER, None), "annotations.json: entry 8 (id 1): id '1' appears twice"),
    ("amber", _entry(AMBER, None, lambda row: row.update(hallu="tree")), "entry 2 (id 2): hallu is 'tree'"),
    ("amber", _entry(AMBER, None, lambda row: row.pop("type")), "entry 2 (id 2): has no text under 'type'"),
    ("amber", _entry(QUERY, None, lambda row: row.update(id=99)), "entry 2 (id 99): has no annotation"),
    ("amber", _entry(QUERY, None, lambda row: row.update(id=1)), "hold items of the other part, first id 1"),
    ("amber", _entry(QUERY, None, lambda row: row.update(image="/etc/passwd")), "names an image outside its folder"),
    ("amber", _entry(QUERY, None, lambda row: row.update(id="4")), "id is '4'; expected a whole number"),
    # MME
    ("mme", _write("existence/000.txt", b"Is it?\tYes\n"), "existence/000.txt: 1 questions; expected 2"),
    ("mme", _write("existence/000.txt", b"Is it?\tYes\nOr not?\tMaybe\n"), "000.txt, line 2: expected question, tab"),
    ("mme", _write("existence/000.txt", b"Is it? Yes\nOr not?\tNo\n"), "000.txt, line 1: expected question, tab"),
    ("mme", _remove("artwork/questions_answers_YN/10.txt"), "artwork: picture '10.jpg' has no questions"),
    # MMBench
    ("mmbench", lambda root: _mmbench(root, 7, "D"), "line 3 (index '2'): answer 'D' is none of the options"),
    ("mmbench", lambda root: _mmbench(root, 4, ""), "has the options ['A', 'C']; expected at least A and B"),
    ("mmbench", lambda root: _mmbench(root, 0, "1"), "index '1' appears twice"),
    ("mmbench", lambda root: _mmbench(root, 0, "x"), "(index 'x'): index is no whole number"),
    ("mmbench", lambda root: _mmbench(root, 1, " "), "question is empty"),
    ("mmbench", lambda root: _mmbench(root, 9, "no/base64" * 20 + "!"), "image is not base64"),
    ("mmbench", lambda root: _mmbench(root, 9, "77"), "image '77' is neither base64 nor the index of a row"),
    ("mmbench", lambda root: _mmbench(root, 9, "QUJD" * 30), "image of index 2"),
    ("mmbench", lambda root: mmbench(root, [*mmbench_rows(), ["9", "x"]]), "line 5 (index '9'): has 2 cells"),
    ("mmbench", _write("MMBench_DEV_EN.tsv", b"index\tquestion\n"), "lacks the columns A, B, image"),
    ("mmbench", _write("second.tsv", b""), "must hold one .tsv table, found MMBench_DEV_EN.tsv, second.tsv"),
    # GQA
    (
        "gqa",
        lambda root: edit(root / GQA, lambda d: d["202"].pop("answer") and None),
        "(question id '202'): has no text under",
    ),
    ("gqa", lambda root: edit(root / GQA, lambda d: d["202"].update(imageId=[1])), "imageId is [1]; expected a number"),
    ("gqa", lambda root: edit(root / GQA, lambda d: d["202"].update(imageId="../../x")), "names an image outside"),
    ("gqa", lambda root: edit(root / GQA, lambda d: d["202"].update(imageId=10**20)), "expected a smaller number"),
    ("gqa", lambda root: edit(root / GQA, lambda d: d.update({"202": []})), "entry 2: is a list; expected an object"),
    # ScienceQA
    (
        "scienceqa",
        lambda r: edit(r / "problems.json", lambda d: d["6"].update(answer=3)),
        "answer is 3; expected a whole",
    ),
    ("scienceqa", lambda r: edit(r / "problems.json", lambda d: d["6"].update(choices=["x"])), "has 1 choices"),
    ("scienceqa", lambda r: edit(r / "problems.json", lambda d: d.pop("6") and None), "names the unknown problem '6'"),
    ("scienceqa", lambda r: edit(r / "pid_splits.json", lambda d: d.pop("test") and None), "under 'test'"),
    ("scienceqa", _remove("test/6/image.png"), "sample 6: the picture "),
    # TextVQA
    ("textvqa", _entry(TEXTVQA, "data", lambda row: row.update(answers=["x"] * 9)), "has 9 answers; expected 10"),
    ("textvqa", _entry(TEXTVQA, "data", lambda row: row.update(answers=[1] * 10)), "holds something that is no text"),
    ("textvqa", _entry(TEXTVQA, "data", lambda row: row.update(question=None)), "34603): has no text under 'question'"),
    ("textvqa", _twice(TEXTVQA, "data"), "question_id '34602' appears twice"),
    ("textvqa:ocr=true", _twice(OCR, "data"), "entry 2 (image_id 'im0'): image_id 'im0' appears twice"),
    (
        "textvqa:ocr=true",
        lambda r: edit(r / OCR, lambda d: d["data"][0].update(ocr_tokens="a")),
        "expected a list of texts",
    ),
    # VQAv2
    (
        "vqav2",
        lambda r: edit(r / VQA_A, lambda d: d["annotations"].pop() and None),
        "(question_id 42002): has no annotation",
    ),
    ("vqav2", lambda r: edit(r / VQA_Q, lambda d: d["questions"].pop() and None), "no question for the annotation of"),
    (
        "vqav2",
        _entry(VQA_A, "annotations", lambda row: row.update(image_id=9)),
        "is about image 43, its annotation about",
    ),
    ("vqav2", _entry(VQA_A, "annotations", lambda row: row.pop("answers")), "(question_id 42001): has no answers"),
    ("vqav2", _entry(VQA_Q, "questions", lambda row: row.update(image_id=True)), "image_id is True; expected a whole"),
    # VizWiz
    ("vizwiz", _twice("Annotations/val.json", None), "image 'VizWiz_val_00000000.jpg' appears twice"),
    (
        "vizwiz",
        _entry("Annotations/val.json", None, lambda row: row.pop("answer_type")),
        "has no text under 'answer_type'",
    ),
    ("vizwiz", _entry("Annotations/val.json", None, lambda row: row.update(image="C:\\x.jpg")), "outside its folder"),
    # captions
    (
        "coco_captions",
        _entry(COCO, "annotations", lambda row: row.update(image_id=99)),
        "is about the unknown image 99",
    ),
    ("coco_captions", _entry(COCO, "annotations", lambda row: row.update(caption=" ")), "(id 2): caption is empty"),
    ("coco_captions", _entry(COCO, "images", lambda row: row.update(id=99)), "image 99 has no caption"),
    ("coco_captions", _twice(COCO, "images"), "image id '11' appears twice"),
    (
        "coco_captions",
        _entry(COCO, "images", lambda r: r.update(file_name="COCO_val2014_000000000011.jpg")),
        "file_name 'COCO",
    ),
    (KARPATHY, _entry("dataset_coco.json", "images", lambda row: row.update(sentences=[])), "has no sentences"),
    (KARPATHY, _entry("dataset_coco.json", "images", lambda row: row.update(filepath="..")), "outside its folder"),
]


@pytest.mark.parametrize(("name", "damage", "message"), FAULTS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FAULTS)])
def test_faults_are_found_and_named(name, damage, message, tmp_path) -> None:
    FOLDERS[name.partition(":")[0]](tmp_path)
    damage(tmp_path)
    faults = check_folder(name, tmp_path, decode=True).faults
    assert faults, "not noticed"
    assert any(message in fault for fault in faults), faults


def test_there_are_many_kinds_of_faults() -> None:
    assert len({message for _, _, message in FAULTS}) >= 60


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("pope", _remove("coco_pope_random.json"), "split random: no questions"),
        ("pope", lambda r: _lines(r / "coco_pope_random.json", lambda x: x.pop()), "random: b.jpg has 5 questions"),
        ("pope", lambda r: _lines(r / "coco_pope_random.json", lambda x: x.pop()), "split random: 6 yes, 5 no"),
        ("chair", _remove(CAPTIONS), "3 images have no captions by people"),
        ("chair", _bare, "1 images show no object, first 12.jpg"),
        ("mme", lambda root: None, "task count: no questions"),
        (
            "mme",
            _write("existence/000.txt", b"Is it?\tYes\nIs it so?\tYes\n"),
            "existence/000.png: both answers are yes",
        ),
        (
            "mmbench",
            lambda r: mmbench(r, [["1000003", *mmbench_rows()[0][1:]]]),
            "question 3: 1 rotations of 2 options",
        ),
    ],
)
def test_what_is_unusual_is_no_fault(name, damage, message, tmp_path) -> None:
    FOLDERS[name](tmp_path)
    damage(tmp_path)
    report = check_folder(name, tmp_path)
    assert report.faults == []
    assert any(message in line for line in report.suspicions), report.suspicions


@pytest.mark.parametrize("name", ["chair", "pope"])
def test_every_fault_of_a_coco_folder_is_listed(name, tmp_path) -> None:
    root = FOLDERS["chair"](tmp_path)
    edit(root / INSTANCES, lambda d: [row.update(bbox=None) for row in d["annotations"]] and None)
    faults = check_folder(name, root).faults
    assert [f"annotations id {i} has no bbox" in faults[n] for n, i in enumerate((110, 111, 120, 121, 130, 131))]
    assert "image 11 (11.jpg) is left out" in faults[6]
    assert faults[-1].endswith("nothing to ask is left")


def test_generated_scenes_are_sound(scenes) -> None:
    for name, samples in (("chair", 12), ("pope", None)):
        report = check_folder(name, scenes)
        assert report.faults == report.suspicions == []
        assert samples in (None, report.samples)


@pytest.fixture
def vislm(monkeypatch, capsys):
    from vislm.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vislm", *map(str, arguments)])
        monkeypatch.delenv("VISLM_DEBUG", raising=False)
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


def test_command(vislm, tmp_path) -> None:
    root = FOLDERS["textvqa"](tmp_path)
    assert vislm("data", "check", "textvqa", root)[:2] == (0, "textvqa: 3 samples, 3 pictures, 0 faults, 0 unusual\n")
    edit(root / TEXTVQA, lambda d: [row.update(answers=[]) for row in d["data"]] and None)
    code, out, _ = vislm("data", "check", "textvqa:split=val", root, "--show", "2")
    assert code == 1
    assert out.splitlines()[0] == f"fault: {TEXTVQA}: entry 1 (question_id 34602): has 0 answers; expected 10"
    assert out.splitlines()[2] == "... and 2 more; --show 4 lists them"
    assert out.splitlines()[3] == "textvqa: 0 samples, 0 pictures, 4 faults, 0 unusual"


def test_command_with_wrong_words(vislm, tmp_path) -> None:
    assert "did you mean 'textvqa'" in vislm("data", "check", "textvq", tmp_path)[2]
    assert vislm("data", "check", "gqa:splitt=x", tmp_path)[0] == 2
    assert vislm("data", "check", "gqa", tmp_path / "nowhere")[0] == 2


def test_python_errors(tmp_path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'mmbench'"):
        check_folder("mmbnch", tmp_path)
    with pytest.raises(UnknownName, match="did you mean 'seed'"):
        check_folder("chair:sed=1", tmp_path)
    with pytest.raises(UnknownName, match="did you mean 'ocr'"):
        check_folder("textvqa:ocrr=1", tmp_path)
    with pytest.raises(UsageError, match="expected bool"):
        check_folder("textvqa:ocr=perhaps", tmp_path)
    with pytest.raises(UsageError, match="not of the form option=value"):
        check_folder("textvqa:ocr", tmp_path)
    with pytest.raises(UsageError, match="similarity can only be given in Python"):
        check_folder("amber:similarity=x", tmp_path)
