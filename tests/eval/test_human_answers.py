"""TextVQA, VQAv2, VizWiz: normalisation, agreement with people, readers, whole runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmm_folders import Canned, edit, textvqa, vizwiz, vqav2

from vislm.errors import AnnotationError, UnknownName
from vislm.eval.prompts import SHORT
from vislm.eval.questions import textvqa as text_vqa
from vislm.eval.questions import vizwiz as viz_wiz
from vislm.eval.questions import vqav2 as vqa_v2
from vislm.eval.questions.vqa_answers import consensus, normalise, vqa_score
from vislm.eval.running.runner import rescore, run


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("The Dog.", "dog"),
        ("None of THE ten", "0 of 10"),
        ("1,000 people?", "1000 people"),
        ("the man's hat", "man 's hat"),
        ("left/right", "left right"),
        ("left / right", "left right"),
        ("a-b -c", "ab c"),  # beside a space once, gone everywhere
        ("3.5", "3.5"),
        ("v.1 3.", "v.1 3"),
        ("10:30", "10:30"),
        ("Im here", "im here"),  # the table's key is "Im": it never applies
        ("dont", "don't"),
        ("." * 40, "." * 8),  # at most 32 periods go
    ],
)
def test_normalisation(raw, expected) -> None:
    assert normalise(raw) == expected


def _by_definition(answer: str, answers: list[str]) -> float:
    scores = []
    for left_out in range(len(answers)):
        others = [a for i, a in enumerate(answers) if i != left_out]
        scores.append(min(1.0, sum(a == answer for a in others) / 3))
    return sum(scores) / len(scores)


@given(st.lists(st.sampled_from(["red", "blue", "dog", "cat"]), min_size=10, max_size=10))
def test_consensus_is_the_mean_over_whom_to_leave_out(answers) -> None:
    scores = consensus(answers)
    assert scores.keys() == set(answers)
    for answer in scores:
        assert scores[answer] == pytest.approx(_by_definition(answer, answers), abs=1e-12)


def test_unheard_of_answers_score_nothing() -> None:
    assert vqa_score("purple", ["red"] * 10) == 0.0
    assert vqa_score("The RED.", ["red"] * 10) == 1.0


def test_textvqa(tmp_path) -> None:
    task = text_vqa.load(textvqa(tmp_path))
    canned = Canned({"34602": "Red.", "34603": "the dog", "34604": "pink"})
    results = run(task, canned, tmp_path / "out", batch_size=2)
    assert results["metrics"] == {"accuracy": pytest.approx((1.0 + 0.3 + 0.0) / 3), "n": 3}
    assert canned.prompts["34602"] == "what is it?" + SHORT
    assert results["config"]["protocol.ocr_tokens"] is False
    assert rescore(task, tmp_path / "out" / "predictions.jsonl")["metrics"] == results["metrics"]


def test_textvqa_with_ocr_tokens(tmp_path) -> None:
    task = text_vqa.load(textvqa(tmp_path), ocr=True, suffix="none")
    assert task.samples[0].prompt == "what is it?\nReference OCR token: STOP, 5th"
    assert task.protocol == {"split": "val", "suffix": "none", "ocr_tokens": True, "parser": "evalai", "n_questions": 3}
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(AnnotationError, match=r"no OCR tokens; expected TextVQA_Rosetta_OCR_v0\.2_val\.json"):
        text_vqa.load(tmp_path, ocr=True)


def test_vqav2_by_type_of_answer(tmp_path) -> None:
    task = vqa_v2.load(vqav2(tmp_path))
    results = run(task, Canned({"42000": "red", "42001": "blue", "42002": "green"}), tmp_path / "out")
    assert results["metrics"]["accuracy"] == pytest.approx((1.0 + 0.6 + 0.9) / 3)
    assert results["per_group"] == {
        "other": {"accuracy": pytest.approx(0.95), "n": 2},
        "yes/no": {"accuracy": pytest.approx(0.6), "n": 1},
    }


def test_secret_answers_are_not_counted_as_wrong(tmp_path) -> None:
    for task, key in (
        (vqa_v2.load(vqav2(tmp_path / "a"), split="test-dev2015"), "42000"),
        (viz_wiz.load(vizwiz(tmp_path / "b"), split="test"), "t.jpg"),
    ):
        results = run(task, Canned({key: "red"}), tmp_path / task.name)
        assert results["metrics"]["n"] == 0
        assert "1 questions have no published answers" in results["metrics"]["warnings"][0]
        assert results["score"]["n"] == 0


def test_vizwiz(tmp_path) -> None:
    task = viz_wiz.load(vizwiz(tmp_path))
    canned = Canned({f"VizWiz_val_0000000{n}.jpg": "red" for n in range(3)})
    results = run(task, canned, tmp_path / "out")
    assert results["metrics"] == {"accuracy": 1.0, "n": 3}
    assert set(results["per_group"]) == {"other", "unanswerable"}
    asked = canned.prompts["VizWiz_val_00000000.jpg"]
    assert asked.startswith("What is this?\nWhen the provided information is insufficient")
    assert asked.endswith(SHORT)
    assert viz_wiz.load(tmp_path, hint=False).samples[0].prompt == "What is this?" + SHORT


def test_broken_rows_are_left_out_by_name(tmp_path) -> None:
    edit(textvqa(tmp_path) / "TextVQA_0.5.1_val.json", lambda d: d["data"][1].update(answers=["red"]))
    task = text_vqa.load(tmp_path)
    assert task.faults == ["TextVQA_0.5.1_val.json: entry 2 (question_id 34603): has 1 answers; expected 10"]
    canned = Canned({"34602": "red", "34604": "red"})
    with pytest.raises(AnnotationError, match="34603"):
        run(task, canned, tmp_path / "stop")
    results = run(task, canned, tmp_path / "skip", on_error="skip")
    assert results["metrics"] == {"accuracy": 1.0, "n": 2}
    assert "34603" in results["broken"][0]["error"]


@pytest.mark.parametrize("module", [text_vqa, vqa_v2, viz_wiz])
def test_wrong_options(module, tmp_path) -> None:
    with pytest.raises(UnknownName, match="split"):
        module.load(tmp_path, split="vall")
    with pytest.raises(UnknownName, match="did you mean 'short'"):
        folder = {"textvqa": textvqa, "vqav2": vqav2, "vizwiz": vizwiz}[module.__name__.rpartition(".")[2]]
        module.load(folder(tmp_path), suffix="shrt")


def test_no_rows_at_all(tmp_path) -> None:
    assert text_vqa.load(textvqa(tmp_path)).aggregate({}) == {
        "accuracy": 0.0,
        "n": 0,
        "warnings": ["accuracy has no denominator"],
    }
