"""The demonstration, small."""

from __future__ import annotations

import json

import pytest

from vislm.demo.run import run_demo
from vislm.demo.settings import settings


def test_settings_hold_every_method_at_every_budget() -> None:
    labels = [s.label for s in settings()]
    for method in ("random", "fastv", "flowcut"):
        assert [label for label in labels if label.startswith(f"{method},")] == [f"{method}, {k}" for k in (32, 16, 8)]


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
    assert results["photograph"][0]["visual tokens"] == 576
