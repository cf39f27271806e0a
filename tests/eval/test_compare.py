"""Comparing runs: the figures are those of the metrics, and unlike runs are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import typer
from answerer import Oracle
from typer.testing import CliRunner

from vislm.cli.compare import compare as command
from vislm.errors import RunFolderError, UsageError
from vislm.eval.benchmarks import load_benchmark
from vislm.eval.compare import compare, figure_interval, read_run, unlike
from vislm.eval.compare_tables import labels, sweep_rows
from vislm.eval.effects import notes
from vislm.eval.questions.yes_no import auroc
from vislm.eval.running.runner import run
from vislm.eval.uncertainty import standard_error


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory) -> dict:
    """POPE answered well and badly, and captions."""
    root = tmp_path_factory.mktemp("runs")
    for name, benchmark, rate in (("good", "pope", 0.1), ("bad", "pope", 0.4), ("captions", "chair", 0.1)):
        run(load_benchmark(benchmark, scenes), Oracle.of_folder(scenes, error_rate=rate), root / name)
    return {name: root / name for name in ("good", "bad", "captions")}


def test_values_are_those_of_the_metrics(runs) -> None:
    good, bad = read_run(runs["good"]), read_run(runs["bad"])
    found = {(c.part, c.figure.name): c for c in compare(good, bad, resamples=200)}
    assert {part for part, _ in found} == {"random", "popular", "adversarial", "all"}
    for (part, figure), c in found.items():
        a, b = (r.results["metrics"]["mean" if part == "all" else part][figure] for r in (good, bad))
        pooled = part == "all" and figure in ("f1", "auroc")  # of all questions, not the mean of the splits
        assert c.a == pytest.approx(a, abs=0.05 if pooled else 1e-9)
        assert c.b == pytest.approx(b, abs=0.05 if pooled else 1e-9)
        assert c.difference.value == pytest.approx(c.a - c.b)
        assert c.difference.low <= c.difference.value <= c.difference.high
    accuracy = found["all", "accuracy"]
    assert accuracy.difference.low > 0
    assert accuracy.difference.wins > accuracy.difference.losses
    assert accuracy.difference.mcnemar < 0.05
    assert unlike(good, bad) == ["error_rate"]


def test_standard_errors_are_clustered_by_picture(runs) -> None:
    good = read_run(runs["good"])
    by_part = {c.part: c for c in compare(good, good, resamples=100) if c.figure.name == "accuracy"}
    rows = [row for row in good.rows.values() if "popular" in row["parts"]]
    expected = standard_error([r["score"] for r in rows], [r["group"] for r in rows])
    assert by_part["popular"].a_error == pytest.approx(expected)


def test_a_run_does_not_differ_from_itself(runs) -> None:
    for name in ("good", "captions"):
        record = read_run(runs[name])
        for c in compare(record, record, resamples=100):
            assert (c.difference.value, c.difference.wins, c.difference.losses, c.difference.mcnemar) == (0, 0, 0, 1)


def test_captions_show_recall_and_length(runs) -> None:
    record = read_run(runs["captions"])
    found = {c.figure.name: c.a for c in compare(record, record, resamples=100)}
    metrics = record.results["metrics"]
    assert found == {name: pytest.approx(metrics[name]) for name in ("CHAIR_i", "CHAIR_s", "Recall", "Length")}


def test_the_fast_auroc_is_the_plain_one(runs) -> None:
    good = read_run(runs["good"])
    figure = next(f for f in good.figures if f.kind == "auroc")
    rows = [row for row in good.rows.values() for _ in row["parts"]]
    expected = auroc([r["truth"] == "yes" for r in rows], [r["values"]["margin"] for r in rows])
    found = figure_interval(good, figure, resamples=100)
    assert found.value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("run.json", lambda d: d.update({"protocol.parser": "pai"}), r"protocol\.parser: 'official' and 'pai'"),
        ("run.json", lambda d: d.update({"samples": "0"}), "different protocols"),
        ("results.json", lambda d: d.pop("figures"), "earlier version"),
        ("results.json", lambda d: d["figures"][0].update(columns=["a", "b"]), "figures"),
    ],
)
def test_unlike_runs_are_refused(runs, tmp_path, file, change, message) -> None:
    shutil.copytree(runs["good"], tmp_path / "changed")
    path = tmp_path / "changed" / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises((UsageError, RunFolderError), match=message):
        compare(read_run(runs["good"]), read_run(tmp_path / "changed"))


def test_other_samples_and_damaged_rows_are_refused(runs, tmp_path) -> None:
    shutil.copytree(runs["good"], tmp_path / "fewer")
    path = tmp_path / "fewer" / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    with pytest.raises(UsageError, match="1 only in"):
        compare(read_run(runs["good"]), read_run(tmp_path / "fewer"))
    for key, value in (("score", "high"), ("group", None), ("values", {"a": "b"}), ("parts", "all"), ("score", 1e999)):
        path.write_text(json.dumps({**json.loads(lines[0]), key: value}) + "\n")
        with pytest.raises(RunFolderError, match=f"1 faults: .*{key}"):
            read_run(tmp_path / "fewer")
    with pytest.raises(RunFolderError, match="no run"):
        read_run(tmp_path)
    (path.parent / "results.json").unlink()
    with pytest.raises(RunFolderError, match="unfinished run"):
        read_run(tmp_path / "fewer")


def test_a_sweep_names_what_varies(runs, tmp_path) -> None:
    records = []
    for number, methods in enumerate(([], ["FlowCut(keep=8, layer=1)"], ["FlowCut(keep=16, layer=1)", "VHR(alpha=2)"])):
        folder = tmp_path / str(number)
        shutil.copytree(runs["good"], folder)
        config = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**config, "interventions": methods}))
        records.append(read_run(folder))
    rows = sweep_rows(records, resamples=100)
    assert [r["run"] for r in rows] == ["all tokens", "FlowCut(keep=8)", "FlowCut(keep=16) + VHR(alpha=2)"]
    assert {"accuracy", "yes_ratio", "auroc", "tokens", "ms"} <= rows[0].keys()
    assert labels([records[0], records[0]])[0].startswith("all tokens (")


def test_figures_over_fewer_samples_say_so(runs, tmp_path) -> None:
    shutil.copytree(runs["good"], tmp_path / "partly")
    path = tmp_path / "partly" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:5]:
        del row["values"]["margin"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = read_run(tmp_path / "partly")
    n = sum(len(row["parts"]) for row in rows[5:])
    whole, partly = sweep_rows([read_run(runs["good"]), record], resamples=100)
    assert str(partly["auroc"]).endswith(f", n = {n}")
    assert "n =" not in str(whole) + str(partly["accuracy"])
    found = {(c.part, c.figure.name): c for c in compare(record, record, resamples=100)}
    assert found["all", "auroc"].n == n < found["all", "accuracy"].n
    (note,) = notes(list(found.values()))
    assert note.startswith(f"AUROC is over {n} of the {found['all', 'accuracy'].n} samples")


def test_the_command_notes_what_shows_no_gain(runs, tmp_path) -> None:
    app = typer.Typer()
    app.command()(command)
    shutil.copytree(runs["good"], tmp_path / "eager")
    path = tmp_path / "eager" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:  # always yes; the logits are those of the other run
        row["values"]["answer"], row["score"] = 1.0, row["values"]["label"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = CliRunner().invoke(app, [str(tmp_path / "eager"), str(runs["good"]), "--resamples", "100"])
    assert shown.exit_code == 0
    found = [line for line in shown.stdout.splitlines() if line.startswith("Note: ")]
    assert [line[6:30] for line in found] == ["B has the higher accurac", "The share of yes moves b"]
    shutil.copytree(runs["captions"], tmp_path / "short")
    path = tmp_path / "short" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["values"]["length"] *= 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = CliRunner().invoke(app, [str(tmp_path / "short"), str(runs["captions"]), "--resamples", "100"])
    assert "Note: A's descriptions are 50 % shorter" in shown.stdout


def test_the_command(runs) -> None:
    app = typer.Typer()
    app.command()(command)
    shown = CliRunner().invoke(app, [str(runs["good"]), str(runs["bad"]), "--resamples", "100"])
    assert shown.exit_code == 0
    assert all(word in shown.stdout for word in ("adversarial", "auroc", "McNemar p", "error_rate"))
    assert "Note:" not in shown.stdout  # better answers, better ranked, as often yes
    shown = CliRunner().invoke(app, ["--sweep", "--markdown", str(runs["good"]), "--resamples", "100"])
    assert shown.stdout.startswith("| run | accuracy |")
    failed = CliRunner().invoke(app, [str(runs["good"])])
    assert isinstance(failed.exception, UsageError)
