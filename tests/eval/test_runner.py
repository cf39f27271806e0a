"""The run folder: resuming, refusing, counting."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
from answerer import Oracle

from vislm.errors import AnnotationError, ImageError, RunFolderError, UnknownName, UsageError, VislmError
from vislm.eval.benchmarks import load_benchmark
from vislm.eval.protocol import Benchmark, Control, Sample, Verdict
from vislm.eval.questions.yes_no import auroc
from vislm.eval.running.runner import rescore, run
from vislm.eval.running.store import open_folder


def metrics(results) -> dict:
    return json.loads(json.dumps(results["metrics"]))


@pytest.fixture
def pope(scenes):
    return load_benchmark("pope", scenes)


def test_results_do_not_depend_on_the_batch_size(scenes, pope, tmp_path) -> None:
    oracle = Oracle.of_folder(scenes)
    results = [run(pope, oracle, tmp_path / str(n), batch_size=n) for n in (1, 7, 1000)]
    assert metrics(results[0]) == metrics(results[1]) == metrics(results[2])
    assert json.loads((tmp_path / "1" / "results.json").read_text())["metrics"] == metrics(results[0])
    assert results[0]["n_missing"] == 0
    assert 0.6 < results[0]["metrics"]["random"]["accuracy"] < 1.0


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_rows_do_not_depend_on_the_workers(scenes, pope, tmp_path, workers) -> None:
    oracle = Oracle.of_folder(scenes)
    run(pope, oracle, tmp_path / "a", batch_size=5, workers=2)
    run(pope, oracle, tmp_path / "b", batch_size=3, workers=workers)
    assert (tmp_path / "a" / "predictions.jsonl").read_bytes() == (tmp_path / "b" / "predictions.jsonl").read_bytes()


def test_rows_hold_what_reports_and_comparisons_need(scenes, pope, tmp_path) -> None:
    run(pope, Oracle.of_folder(scenes), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [s.id for s in pope.samples]
    row = rows[0]
    assert (row["images"], row["group"]) == (["000001.png"], "000001.png")
    assert row["score"] == float(row["answer"] == row["truth"])
    assert row["values"]["margin"] == row["candidates"]["yes"] - row["candidates"]["no"]
    assert set(row["parts"]) <= {"random", "popular", "adversarial"}


def test_a_finished_run_is_not_asked_again(scenes, pope, tmp_path) -> None:
    oracle = Oracle.of_folder(scenes)
    first = run(pope, oracle, tmp_path)
    calls = oracle.calls
    assert metrics(run(pope, oracle, tmp_path)) == metrics(first)
    assert oracle.calls == calls


def test_chair_runs(scenes, tmp_path) -> None:
    results = run(load_benchmark("chair", scenes), Oracle.of_folder(scenes), tmp_path)
    assert results["metrics"]["Recall"] == 1.0
    assert results["metrics"]["CHAIR_i"] == 0.0  # a zebra is no scene category
    assert results["n"] == 12


@pytest.mark.parametrize("tail", [b'{"id": "x", "te', b"\xff\xfe", b'{"id": "y", "text": "torn"}'])
def test_a_torn_last_line_is_dropped(scenes, pope, tmp_path, tail) -> None:
    oracle = Oracle.of_folder(scenes)
    expected = metrics(run(pope, oracle, tmp_path))
    rows = tmp_path / "predictions.jsonl"
    whole = rows.read_bytes()
    lines = whole.splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[:-3]) + tail)
    assert metrics(run(pope, oracle, tmp_path)) == expected
    assert sorted(rows.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_damage_elsewhere_is_refused(scenes, pope, tmp_path) -> None:
    oracle = Oracle.of_folder(scenes)
    run(pope, oracle, tmp_path)
    rows = tmp_path / "predictions.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"junk\n" + b"".join(lines))
    with pytest.raises(RunFolderError, match="line 1 is damaged"):
        run(pope, oracle, tmp_path)
    rows.write_bytes(lines[0] + b"".join(lines))
    with pytest.raises(RunFolderError, match="an id twice"):
        run(pope, oracle, tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunFolderError, match=r"no run\.json"):
        run(pope, oracle, tmp_path)


def test_another_fingerprint_is_refused_by_field(scenes, pope, tmp_path) -> None:
    run(pope, Oracle.of_folder(scenes), tmp_path)
    with pytest.raises(RunFolderError, match=r"error_rate: 0\.2 there, 0\.5 now"):
        run(pope, Oracle.of_folder(scenes, error_rate=0.5), tmp_path)
    with pytest.raises(RunFolderError, match="benchmark: 'pope' there, 'chair' now"):
        run(load_benchmark("chair", scenes), Oracle.of_folder(scenes), tmp_path)


def test_two_runs_in_one_folder_are_refused(scenes, pope, tmp_path) -> None:
    oracle = Oracle.of_folder(scenes)
    with open_folder(tmp_path, {"a": 1}), pytest.raises(RunFolderError, match="another process"):
        run(pope, oracle, tmp_path)


def test_broken_pictures_stop_or_are_listed(scenes, tmp_path) -> None:
    folder = Path(shutil.copytree(scenes, tmp_path / "data"))
    oracle = Oracle.of_folder(folder)
    (folder / "images" / "000003.png").write_bytes(b"nothing")
    (folder / "images" / "000005.png").unlink()
    benchmark = load_benchmark("chair", folder)
    with pytest.raises(ImageError, match=r"000003\.png"):
        run(benchmark, oracle, tmp_path / "stop", batch_size=2)
    results = run(benchmark, oracle, tmp_path / "skip", batch_size=2, on_error="skip")
    assert [b["id"] for b in results["broken"]] == ["000003.png", "000005.png"]
    assert (results["n"], results["n_missing"], results["metrics"]["n"]) == (10, 2, 10)
    shutil.copy(scenes / "images" / "000003.png", folder / "images" / "000003.png")
    assert run(benchmark, oracle, tmp_path / "skip", on_error="skip")["n"] == 11


def test_changed_questions_prompts_and_truths_are_another_run(scenes, pope, tmp_path) -> None:
    oracle = Oracle.of_folder(scenes)
    run(pope, oracle, tmp_path)
    question = pope.questions[0]
    for changed in (replace(question, text=question.text + " Answer yes or no."), replace(question, label="no")):
        other = replace(pope, questions=[changed, *pope.questions[1:]])
        with pytest.raises(RunFolderError, match="samples: '"):
            run(other, oracle, tmp_path)


@dataclass(frozen=True)
class Captions(Benchmark):
    """A benchmark as a user would write it."""

    paths: tuple[Path, ...]
    faults: tuple[str, ...] = ()
    control: Control = "none"
    name = "captions"

    @cached_property
    def samples(self) -> list[Sample]:
        return [Sample(p.name, (p, self.paths[0]), "Describe the two images.") for p in self.paths]

    @property
    def protocol(self) -> dict:
        return {}

    def parse(self, row) -> Verdict:
        return Verdict(row["text"], None)

    def aggregate(self, rows) -> dict:
        return {"n": len(rows)}


class Looker:
    """A subject that says which colours it saw."""

    def fingerprint(self) -> dict:
        return {"model": "looker"}

    def respond(self, batch, *, max_new_tokens) -> list[dict]:
        return [{"text": str([im.getpixel((0, 0)) for im in a.images]), "seconds": 0.0} for a in batch]


def test_several_pictures_a_subject_of_its_own_and_broken_rows(scenes, tmp_path) -> None:
    paths = tuple(sorted((scenes / "images").glob("*.png")))[:3]
    results = run(Captions(paths), Looker(), tmp_path / "a")
    assert (results["n"], results["score"]["n"], results["metrics"]) == (3, 0, {"n": 3})
    row = json.loads((tmp_path / "a" / "predictions.jsonl").read_text().splitlines()[2])
    assert row["images"] == [paths[2].name, paths[0].name]
    assert row["text"].count("(") == 2
    with pytest.raises(AnnotationError, match="1 broken rows: line 7 has no image; mend them"):
        run(Captions(paths, ("line 7 has no image",)), Looker(), tmp_path / "b")
    results = run(Captions(paths, ("line 7 has no image",)), Looker(), tmp_path / "c", on_error="skip")
    assert results["broken"] == [{"id": "", "error": "line 7 has no image"}]


def test_ids_that_are_not_unique_and_models_that_cannot_answer(scenes, tmp_path) -> None:
    path = scenes / "images" / "000001.png"
    with pytest.raises(AnnotationError, match=r"id '000001\.png' appears twice"):
        run(Captions((path, path)), Looker(), tmp_path)
    with pytest.raises(UsageError, match="int cannot be evaluated"):
        run(Captions((path,)), 3, tmp_path)


def test_memory_that_does_not_suffice_is_explained(scenes, pope, tmp_path) -> None:
    class Full(Oracle):
        def ask_many(self, images, questions, **_):
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(VislmError, match="batch of 8 samples: use a smaller --batch-size"):
        run(pope, Full({}), tmp_path, batch_size=8)


def test_results_state_what_was_run(scenes, pope, tmp_path) -> None:
    results = run(pope, Oracle.of_folder(scenes), tmp_path)
    assert set(results["versions"]) == {"vislm", "torch", "transformers", "pillow"}
    assert sum(group["n"] for group in results["per_group"].values()) == len(pope.questions)
    assert results["config"]["error_rate"] == 0.2


def test_a_limit_can_be_raised_in_the_same_folder(scenes, pope, tmp_path) -> None:
    oracle = Oracle.of_folder(scenes)
    few = run(pope, oracle, tmp_path, limit=20)
    assert (few["n"], few["n_missing"]) == (20, 0)
    assert all(value["n"] for name, value in few["metrics"].items() if name in ("random", "popular", "adversarial"))
    assert metrics(run(pope, oracle, tmp_path)) == metrics(run(pope, oracle, tmp_path / "whole"))


def test_predictions_are_scored_again_without_the_model(scenes, pope, tmp_path) -> None:
    results = run(pope, Oracle.of_folder(scenes), tmp_path)
    rows = tmp_path / "predictions.jsonl"
    again = rescore(pope, rows)
    assert json.loads(json.dumps(again["metrics"])) == metrics(results)
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(reversed(lines[1:])))  # joined by id: the order is of no account, a lost row is noticed
    with pytest.raises(AnnotationError, match="1 samples without a row"):
        rescore(pope, rows)
    assert rescore(pope, rows, allow_partial=True)["n_missing"] == 1
    rows.write_text("".join([*lines, '{"id": "stranger", "text": ""}\n']))
    with pytest.raises(AnnotationError, match=r"1 rows without a sample .*stranger"):
        rescore(pope, rows, allow_partial=True)
    with pytest.raises(RunFolderError, match="cannot read"):
        rescore(pope, tmp_path / "missing.jsonl")


def test_answers_without_logits_have_no_auroc(scenes, pope, tmp_path) -> None:
    run(pope, Oracle.of_folder(scenes), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    result = pope.aggregate({r["id"]: {"text": r["text"]} for r in rows})
    assert "auroc" not in result["mean"]
    assert result["mean"]["accuracy"] == run(pope, Oracle.of_folder(scenes), tmp_path)["metrics"]["mean"]["accuracy"]


def test_a_row_without_logits_does_not_take_the_auroc_away(scenes, pope, tmp_path) -> None:
    whole = run(pope, Oracle.of_folder(scenes), tmp_path)["metrics"]
    rows = {r["id"]: r for r in map(json.loads, (tmp_path / "predictions.jsonl").read_text().splitlines())}
    bare = next(i for i, r in rows.items() if r["parts"] == ["popular"])
    del rows[bare]["candidates"]
    partly = pope.aggregate(rows)
    assert partly["random"] == whole["random"]
    left = [r for i, r in rows.items() if i != bare and "popular" in r["parts"]]
    expected = auroc([r["truth"] == "yes" for r in left], [r["values"]["margin"] for r in left])
    assert partly["popular"]["auroc"] == pytest.approx(expected)
    assert partly["popular"]["n_without_margin"] == 1
    text = f"auroc is over {len(left)} of {len(left) + 1} answers, those with the logits of yes and no"
    assert partly["popular"].pop("warnings") == [text]
    assert {k: v for k, v in partly["popular"].items() if k not in ("auroc", "n_without_margin")} == {
        k: v for k, v in whole["popular"].items() if k != "auroc"
    }
    assert partly["mean"]["n_without_margin"] == 1
    assert partly["mean"]["warnings"] == ["auroc leaves out answers without the logits of yes and no: 1 in popular"]
    for row in rows.values():
        if "popular" in row["parts"]:
            row["candidates"] = {}
    none = pope.aggregate(rows)["mean"]
    assert "auroc" not in none
    assert none["warnings"] == ["no auroc: no answer of popular has the logits of yes and no"]


def test_nothing_is_drawn_where_there_is_no_terminal(scenes, pope, tmp_path, capfd) -> None:
    run(pope, Oracle.of_folder(scenes), tmp_path, progress=True)
    assert capfd.readouterr() == ("", "")


def test_grey_control_hides_every_picture(scenes) -> None:
    from vislm.eval.running.pictures import picture

    benchmark = load_benchmark("pope", scenes, control="grey")
    image = picture(benchmark.samples[0].images[0], benchmark.control)
    assert image.getcolors() == [(64 * 64, (128, 128, 128))]


def test_coco_folders_use_the_official_questions(tmp_path) -> None:
    names = ["person", "dog", "cat", "car", "bus", "cup"]
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)],
        "categories": [{"id": i, "name": n} for i, n in enumerate(names)],
        "annotations": [
            {"id": 10 * i + k, "image_id": i, "category_id": (i + k) % 6, "bbox": [0, 0, 1, 1]}
            for i in range(4)
            for k in range(3)
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(data))
    benchmark = load_benchmark("pope", tmp_path)
    assert benchmark.protocol["questions"].startswith("official algorithm")
    assert len(benchmark.questions) == 3 * 4 * 6
    assert {q.split for q in benchmark.questions[:18]} == {"random", "popular", "adversarial"}  # image by image
    assert load_benchmark("chair", tmp_path).max_new_tokens == 512


def test_official_question_files_are_used_as_they_are(scenes, tmp_path) -> None:
    (tmp_path / "images").symlink_to(scenes / "images")
    for split in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": i + 1,
                "image": f"00000{i % 3 + 1}.png",
                "text": f"Is there a {o} in the image?",
                "label": a,
            }
            for i, (o, a) in enumerate([("star", "yes"), ("cup", "no"), ("dog", "yes"), (f"{split} thing", "no")])
        ]
        (tmp_path / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))
    benchmark = load_benchmark("pope", tmp_path)
    assert benchmark.protocol["questions"].endswith("coco_pope_adversarial.json")
    results = run(benchmark, Oracle.of_folder(scenes), tmp_path / "out")
    assert [results["metrics"][split]["n"] for split in ("random", "popular", "adversarial")] == [4, 4, 4]
    assert results["n"] == 6  # the three questions that the splits share are asked once


@pytest.mark.parametrize(
    "options", [{"on_error": "ignore"}, {"batch_size": 0}, {"limit": 0}, {"limit": -1}, {"workers": -1}]
)
def test_impossible_options(scenes, pope, tmp_path, options) -> None:
    with pytest.raises((UnknownName, UsageError)):
        run(pope, Oracle({}), tmp_path, **options)


def test_unknown_benchmarks_and_empty_folders(scenes, tmp_path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'pope'"):
        load_benchmark("popee", scenes)
    (tmp_path / "instances.json").write_text(json.dumps({"images": [], "categories": [], "annotations": []}))
    with pytest.raises(AnnotationError, match="no images"):
        load_benchmark("pope", tmp_path)
