"""GQA: reader, comparison, whole run."""

from __future__ import annotations

import pytest
from lmm_folders import Canned
from lmm_folders import gqa as folder

from vislm.errors import AnnotationError, UnknownName
from vislm.eval.prompts import SHORT
from vislm.eval.questions import gqa
from vislm.eval.running.runner import run


def test_a_whole_run(tmp_path) -> None:
    task = gqa.load(folder(tmp_path))
    canned = Canned({"201": "Yes.", "202": "t shirt", "203": "Man"})
    results = run(task, canned, tmp_path / "out")
    assert results["metrics"] == {"accuracy": pytest.approx(2 / 3), "n": 3}
    assert results["per_group"] == {"query": {"accuracy": 0.0, "n": 1}, "verify": {"accuracy": 1.0, "n": 1}}
    assert canned.prompts["201"] == "Is it red?" + SHORT
    assert results["config"]["protocol.parser"] == "llava"


@pytest.mark.parametrize(
    ("text", "llava", "lmms"),
    [("T-shirt.", "t-shirt", "tshirt"), ("yes!", "yes!", "yes"), ("No...", "no", "no"), ("", "", "")],
)
def test_two_rules(text, llava, lmms) -> None:
    assert gqa.comparable(text, "llava") == llava
    assert gqa.comparable(text, "lmms-eval") == lmms


def test_the_rule_also_applies_to_the_right_answer(tmp_path) -> None:
    row = {"id": "202", "text": "tshirt"}
    assert gqa.load(folder(tmp_path), parser="lmms-eval").parse(row).score == 1.0
    assert gqa.load(tmp_path).parse(row).score == 0.0


def test_options_and_layout(tmp_path) -> None:
    with pytest.raises(UnknownName, match="GQA rule"):
        gqa.load(folder(tmp_path), parser="lava")
    with pytest.raises(AnnotationError, match=r"expected val_balanced_questions\.json or questions1\.2/val_balanced"):
        gqa.load(tmp_path, split="val_balanced")
    assert gqa.load(tmp_path).aggregate({})["warnings"]
