"""The run folder: resuming, refusing, counting."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import answerer
import pytest
from answerer import Oracle

from vislm.errors import AnnotationError, ImageError, RunFolderError, UnknownName, UsageError
from vislm.eval.benchmarks import load_benchmark
from vislm.eval.runner import rescore, run
from vislm.eval.store import open_store


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
    with open_store(tmp_path, {"a": 1}), pytest.raises(RunFolderError, match="another process"):
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
    assert [b["id"] for b in results["broken_images"]] == ["000003.png", "000005.png"]
    assert (results["n"], results["n_missing"], results["metrics"]["n"]) == (10, 2, 10)
    shutil.copy(scenes / "images" / "000003.png", folder / "images" / "000003.png")
    assert run(benchmark, oracle, tmp_path / "skip", on_error="skip")["n"] == 11


def test_killed_runs_lose_and_repeat_nothing(scenes, pope, tmp_path) -> None:
    """kill -9 at random moments until the run is done; the table equals that of an undisturbed run."""
    expected = metrics(run(pope, Oracle.of_folder(scenes), tmp_path / "whole"))
    command = [sys.executable, answerer.__file__, str(scenes), str(tmp_path / "killed"), "0.02"]
    rng, kills = random.Random(0), 0
    for _ in range(30):
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows = tmp_path / "killed" / "predictions.jsonl"
        target = (rows.stat().st_size if rows.exists() else 0) + rng.randint(1, 6000)
        while process.poll() is None and (rows.stat().st_size if rows.exists() else 0) < target:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.wait() == 0
    assert kills >= 2
    results = json.loads((tmp_path / "killed" / "results.json").read_text())
    assert results["metrics"] == expected
    ids = [json.loads(line)["id"] for line in (tmp_path / "killed" / "predictions.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == results["n"]


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
    result = pope.score({r["id"]: {"text": r["text"]} for r in rows})
    assert "auroc" not in result["mean"]
    assert result["mean"]["accuracy"] == run(pope, Oracle.of_folder(scenes), tmp_path)["metrics"]["mean"]["accuracy"]


def test_any_answer_survives_the_store(tmp_path) -> None:
    texts = ["line\nbreak", "\u2028", "\ud800", "\0", "", "é", '"}{']
    with open_store(tmp_path, {"a": 1}) as store:
        store.add([{"id": str(i), "text": t} for i, t in enumerate(texts)])
    with open_store(tmp_path, {"a": 1}) as store:
        assert [row["text"] for row in store.rows.values()] == texts


def test_grey_control_hides_every_picture(scenes) -> None:
    from vislm.eval.benchmarks import picture

    benchmark = load_benchmark("pope", scenes, control="grey")
    image = picture(benchmark.samples[0], benchmark.control)
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
    assert len(load_benchmark("pope", tmp_path, limit=1).questions) == 6


@pytest.mark.parametrize("options", [{"on_error": "ignore"}, {"batch_size": 0}, {"limit": 0}, {"limit": -1}])
def test_impossible_options(scenes, pope, tmp_path, options) -> None:
    with pytest.raises((UnknownName, UsageError)):
        run(pope, Oracle({}), tmp_path, **options)


def test_unknown_benchmarks_and_empty_folders(scenes, tmp_path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'pope'"):
        load_benchmark("popee", scenes)
    (tmp_path / "instances.json").write_text(json.dumps({"images": [], "categories": [], "annotations": []}))
    with pytest.raises(AnnotationError, match="no images"):
        load_benchmark("pope", tmp_path)
