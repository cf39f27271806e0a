"""The demonstration: its settings, its questions, and the whole of it in small."""

from __future__ import annotations

import json

import pytest

from vislm.data.scenes import generate_scenes
from vislm.data.turns import caption
from vislm.demo.questions import answered_right, ask_about, scene_turns
from vislm.demo.run import run_demo
from vislm.demo.settings import settings
from vislm.errors import UsageError
from vislm.lmm.model import load_lmm


def test_settings_hold_every_method_at_every_budget() -> None:
    labels = [s.label for s in settings()]
    for method in ("random", "fastv", "flowcut"):
        assert [label for label in labels if label.startswith(f"{method},")] == [f"{method}, {k}" for k in (32, 16, 8)]
    assert settings()[0].interventions == ()


def test_true_answers_are_right_and_others_are_not() -> None:
    for scene in generate_scenes(10, 8):
        turns = scene_turns(scene)
        for turn in turns:
            assert answered_right(scene, turn, turn.answer)
            assert not answered_right(scene, turn, "no idea")
        everything = " and a ".join([caption(scene), *scene.absent])
        assert not answered_right(scene, turns[-1], everything)
        assert {turn.kind for turn in turns} >= {"presence", "count", "colour", "caption"}


def test_the_model_is_asked_every_question() -> None:
    scenes = list(generate_scenes(2, 8))
    replies = ask_about(load_lmm(), scenes)
    assert [[r.question for r in rows] for rows in replies] == [[t.question for t in scene_turns(s)] for s in scenes]
    assert sum(reply.right for rows in replies for reply in rows) >= sum(map(len, replies)) // 2


@pytest.mark.parametrize("options", [{"scenes": 0}, {"photo_layers": 1}])
def test_bad_sizes(options, tmp_path) -> None:
    with pytest.raises(UsageError, match="expected scenes >= 1 and photo_layers >= 2"):
        run_demo(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_demonstration_runs(tmp_path) -> None:
    lines: list[str] = []
    page = run_demo(tmp_path, scenes=3, photo_layers=2, report=lines.append)
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 5
    assert "http://" not in text
    results = json.loads((tmp_path / "results.json").read_text())
    tokens = {row["setting"]: row["tokens"] for row in results["settings"]}
    assert (tokens["flowcut, 8"], tokens["fastv, 16"], tokens["VHR, 64"]) == (8, 16, 64)
    assert [row["visual tokens"] for row in results["photograph"]] == [576, 64, 64]
    full, flowcut, fastv = (row["TFLOPs"] for row in results["photograph"])
    assert full > fastv > flowcut
    assert any("done in" in line for line in lines)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("index.html", "results.json"),
        *(f"{name}.png" for name in ("scenes", "tokens", "curves", "heads", "photo")),
    }
