"""The demonstration, small."""

from __future__ import annotations

import json

import pytest

from vislm.data.scenes import generate_scenes
from vislm.data.turns import caption
from vislm.demo.run import answered_right, run_demo, scene_turns, settings


def test_true_answers_are_right_and_others_are_not() -> None:
    for scene in generate_scenes(10, 8):
        for turn in scene_turns(scene):
            assert answered_right(scene, turn, turn.answer)
            assert not answered_right(scene, turn, "no idea")
        assert not answered_right(scene, scene_turns(scene)[-1], caption(scene) + " and a zebra and a house and a car")


def test_settings_hold_every_method_at_every_budget() -> None:
    labels = [s.label for s in settings()]
    for method in ("random", "fastv", "flowcut"):
        assert [label for label in labels if label.startswith(f"{method},")] == [f"{method}, {k}" for k in (32, 16, 8)]


@pytest.mark.slow
def test_the_demonstration_runs(tmp_path) -> None:
    lines: list[str] = []
    page = run_demo(tmp_path, scenes=3, photo_layers=2, report=lines.append)
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 4
    assert "http://" not in text
    results = json.loads((tmp_path / "results.json").read_text())
    tokens = {row["setting"]: row["tokens"] for row in results["settings"]}
    assert (tokens["flowcut, 8"], tokens["fastv, 16"], tokens["VHR, 64"]) == (8, 16, 64)
    assert [row["visual tokens"] for row in results["photograph"]] == [576, 64, 64]
    sizes = [row["TFLOPs"] for row in results["photograph"]]
    assert sizes[0] > sizes[2] > sizes[1]
