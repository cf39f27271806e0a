"""ScienceQA: reader, both rules, whole run."""

from __future__ import annotations

import pytest
from lmm_folders import Canned
from lmm_folders import scienceqa as folder

from vislm.errors import AnnotationError, UnknownName
from vislm.eval.prompts import LETTER
from vislm.eval.questions import scienceqa
from vislm.eval.questions.choice_answers import scienceqa_answer
from vislm.eval.running.runner import run


def test_a_whole_run_of_questions_with_a_picture(tmp_path) -> None:
    task = scienceqa.load(folder(tmp_path))
    canned = Canned({"4": "B", "6": "(C)"})
    results = run(task, canned, tmp_path / "out")
    assert results["metrics"] == {"accuracy": 0.5, "n": 2, "n_unparsed": 1}
    assert canned.prompts == {
        "4": "Which?\nA. one\nB. two" + LETTER,
        "6": "Context: Hm.\nWho?\nA. x\nB. y\nC. z" + LETTER,
    }
    assert len({s.cluster for s in task.samples}) == 2


def test_all_questions(tmp_path) -> None:
    task = scienceqa.load(folder(tmp_path), images_only=False)
    results = run(task, Canned({"4": "B", "5": "A", "6": "A", "7": "B"}), tmp_path / "out")
    assert results["metrics"]["accuracy"] == 0.5
    assert results["per_group"] == {
        "image": {"accuracy": 0.5, "n": 2},
        "language science": {"accuracy": 0.0, "n": 1},
        "natural science": {"accuracy": pytest.approx(2 / 3), "n": 3},
        "none": {"accuracy": 0.0, "n": 1},
        "text": {"accuracy": 1.0, "n": 1},
    }


def test_a_letter_beyond_the_choices_is_wrong(tmp_path) -> None:
    assert scienceqa.load(folder(tmp_path)).parse({"id": "4", "text": "D"}).score == 0.0


def test_rules_differ() -> None:
    assert [scienceqa_answer(t) for t in ("b", "B.", "The answer is F. ")] == [None, None, "F"]
    assert [scienceqa_answer(t, "lmms-eval") for t in ("b", "B.", "The answer is F. ", "")] == ["B", "B", None, None]


def test_splits_and_options(tmp_path) -> None:
    assert [s.id for s in scienceqa.load(folder(tmp_path), split="minitest").samples] == ["4"]
    with pytest.raises(AnnotationError, match="no list of problem numbers under 'val'"):
        scienceqa.load(tmp_path, split="val")
    with pytest.raises(UnknownName, match="ScienceQA rule"):
        scienceqa.load(tmp_path, parser="lama")
    assert scienceqa.load(tmp_path).aggregate({})["warnings"]
