"""MME: both layouts, the parser, the two kinds of accuracy, whole runs."""

from __future__ import annotations

import pytest
from lmm_folders import Canned
from lmm_folders import mme as folder

from vislm.errors import AnnotationError, UnknownName
from vislm.eval.prompts import SHORT
from vislm.eval.questions import mme
from vislm.eval.running.runner import run


def test_a_whole_run(tmp_path) -> None:
    task = mme.load(folder(tmp_path))
    ids = [s.id for s in task.samples]
    assert ids[:2] == ["existence/000.png/1", "existence/000.png/2"]
    assert "artwork/10.jpg/1" in ids
    wrong = {"existence/001.png/2", "artwork/10.jpg/1", "code_reasoning/7.png/1", "code_reasoning/7.png/2"}
    labels = {s.id: s.truth for s in task.samples}
    canned = Canned({i: ("Yes" if (labels[i] == "yes") != (i in wrong) else "No.") for i in ids})
    results = run(task, canned, tmp_path / "out")
    assert results["per_group"] == {
        "existence": {"accuracy": 75.0, "accuracy_plus": 50.0, "score": 125.0, "images": 2},
        "artwork": {"accuracy": 50.0, "accuracy_plus": 0.0, "score": 50.0, "images": 1},
        "code_reasoning": {"accuracy": 50.0, "accuracy_plus": 50.0, "score": 100.0, "images": 2},
    }
    assert {k: results["metrics"][k] for k in ("perception", "cognition", "total", "n")} == {
        "perception": 175.0,
        "cognition": 100.0,
        "total": 275.0,
        "n": 10,
    }
    assert "count" in results["metrics"]["warnings"][0]
    assert canned.prompts[ids[0]] == "Is it 000?" + SHORT
    assert len({s.cluster for s in task.samples}) == 5


def test_yes_ratio_and_auroc(tmp_path) -> None:
    task = mme.load(folder(tmp_path))
    rows = {s.id: {"id": s.id, "text": "Yes" if n < 4 else "No"} for n, s in enumerate(task.samples)}
    plain = task.aggregate(rows)
    assert plain["yes_ratio"] == 0.4
    assert "auroc" not in plain
    for n, (i, row) in enumerate(rows.items()):
        row["candidates"] = {"yes": float(task.parse({"id": i, "text": "Yes"}).score == 1.0) - (n == 0), "no": 0.0}
    ranked = task.aggregate(rows)
    assert ranked["auroc"] == 0.9  # one of five yes questions ties with the no questions
    assert task.parse(rows[task.samples[1].id]).values == {"label": 0.0, "answer": 1.0, "margin": 0.0}
    del rows[task.samples[2].id]["candidates"]
    partly = task.aggregate(rows)
    assert partly["n_without_margin"] == 1
    assert any("auroc is over 9 of 10 answers" in text for text in partly["warnings"])
    assert {k: partly[k] for k in plain if k != "warnings"} == {k: plain[k] for k in plain if k != "warnings"}


def test_prompts(tmp_path) -> None:
    official = mme.load(folder(tmp_path), prompt="official")
    assert official.samples[0].prompt == "Is it 000? Please answer yes or no."
    assert official.protocol["prompt"] == "official"
    with pytest.raises(UnknownName, match="did you mean 'official'"):
        mme.load(tmp_path, prompt="oficial")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        (" NO. ", "no"),
        ("y", "yes"),
        ("N.", "no"),
        ("not sure", "no"),
        ("The answer is no", "other"),
        ("", "other"),
        ("eyes", "yes"),
        ("...yes", "yes"),
    ],
)
def test_only_the_first_four_characters_count(text, answer) -> None:
    assert mme.parse_answer(text) == answer


def test_unreadable_answers_are_wrong(tmp_path) -> None:
    verdict = mme.load(folder(tmp_path)).parse({"id": "existence/000.png/2", "text": "maybe"})
    assert (verdict.answer, verdict.score) == (None, 0.0)
    assert verdict.parts == ("existence", "perception")


def test_a_picture_without_its_second_answer_is_not_right_twice() -> None:
    assert mme.task_score([[1.0]]) == {"accuracy": 100.0, "accuracy_plus": 0.0, "score": 100.0, "images": 1}
    assert mme.task_score([])["score"] == 0.0


def test_another_folder(tmp_path) -> None:
    with pytest.raises(AnnotationError, match="none of MME's task folders"):
        mme.load(tmp_path)
