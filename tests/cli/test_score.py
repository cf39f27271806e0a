"""``vislm score`` judges answers that are in a file."""

from __future__ import annotations

import json
import sys

import pytest

from vislm.cli import main
from vislm.data.scenes import write_scenes
from vislm.eval.benchmarks import load_benchmark


@pytest.fixture
def scenes(tmp_path):
    write_scenes(tmp_path / "scenes", 4, 11)
    return tmp_path / "scenes"


def score(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["vislm", "score", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def answers(scenes, rows: int | None = None):
    path = scenes.parent / "answers.jsonl"
    samples = load_benchmark("pope", scenes).samples[:rows]
    path.write_text("".join(json.dumps({"id": s.id, "text": "Yes, there is."}) + "\n" for s in samples))
    return path


def test_always_yes(scenes, monkeypatch, capsys) -> None:
    out = scenes.parent / "results.json"
    assert score(monkeypatch, "pope", answers(scenes), "--data", scenes, "--out", out) == 0
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["random"]["accuracy"] == 0.5
    assert metrics["random"]["yes_ratio"] == 1.0
    assert "adversarial" in capsys.readouterr().out


def test_missing_rows_are_named_or_allowed(scenes, monkeypatch, capsys) -> None:
    path = answers(scenes, 2)
    assert score(monkeypatch, "pope", path, "--data", scenes) == 1
    assert "samples without a row" in capsys.readouterr().err
    assert score(monkeypatch, "pope", path, "--data", scenes, "--partial") == 0


def test_unknown_benchmark(scenes, monkeypatch, capsys) -> None:
    assert score(monkeypatch, "popee", answers(scenes), "--data", scenes) == 2
    assert "pope" in capsys.readouterr().err
