"""AMBER: official figures, parsers, descriptions, whole runs."""

from __future__ import annotations

import pytest
from lmm_folders import Canned
from lmm_folders import amber as folder

from vislm.errors import UnknownName, UsageError
from vislm.eval.questions import amber
from vislm.eval.questions.amber_scores import discriminative, generative
from vislm.eval.running.runner import run

ALIKE = {frozenset(("grass", "lawn")), frozenset(("man", "tree"))}


def similarity(a: str, b: str) -> float:
    return 0.9 if frozenset((a, b)) in ALIKE else 0.1


def nouns(text: str) -> list[str]:
    return text.split()


def test_a_whole_run_of_questions(tmp_path) -> None:
    task = amber.load(folder(tmp_path))
    canned = Canned({"3": "Yes.", "4": "no", "5": "Yes", "6": "No", "7": "maybe"})
    results = run(task, canned, tmp_path / "out")
    metrics = results["metrics"]
    official = {"accuracy": 60.0, "precision": 100.0, "recall": 66.6, "f1": 79.9}
    assert metrics["all"] == {**official, "yes_ratio": 40.0}
    assert metrics["existence"] == {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 100.0}
    assert metrics["state"]["accuracy"] == 100.0
    assert (metrics["n_normalised"], metrics["n_unparsed"], metrics["n"]) == (2, 1, 5)
    assert "number" not in metrics
    assert canned.prompts["3"].startswith("Is it 0?\nAnswer the question")


def margins(**of: float | None) -> dict[str, dict]:
    """Rows of the five questions, all answered No, with the logits that are given."""
    return {
        i: {"id": i, "text": "No", **({} if m is None else {"candidates": {"yes": m, "no": 0.0}})}
        for i, m in ((key.removeprefix("q"), m) for key, m in of.items())
    }


def test_logits_rank_the_questions(tmp_path) -> None:
    task = amber.load(folder(tmp_path))  # yes is right for 3 and 7, no for 4, 5 and 6
    metrics = task.aggregate(margins(q3=-1.0, q4=-3.0, q5=-0.5, q6=-2.0, q7=-0.2))
    assert (metrics["all"]["yes_ratio"], metrics["all"]["auroc"]) == (0.0, 83.33)
    assert metrics["state"]["auroc"] == metrics["attribute"]["auroc"] == 100.0
    assert "warnings" not in metrics
    partly = task.aggregate(margins(q3=-1.0, q4=-3.0, q5=-0.5, q6=None, q7=None))
    assert (partly["all"]["auroc"], partly["all"]["n_without_margin"]) == (50.0, 2)
    assert "auroc" not in partly["relation"]
    assert partly["warnings"] == ["auroc is over 3 of 5 answers, those with the logits of yes and no"]
    assert {k: partly["all"][k] for k in ("accuracy", "f1")} == {k: metrics["all"][k] for k in ("accuracy", "f1")}


def test_exact_answers_only(tmp_path) -> None:
    task = amber.load(folder(tmp_path), parser="exact", suffix="none")
    assert [task.parse({"id": "3", "text": t}).score for t in ("Yes", "yes", "Yes.")] == [1.0, 0.0, 0.0]
    assert task.samples[0].prompt == "Is it 0?"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes, it is", "Yes"),
        (" NO", "No"),
        ('"No"', "No"),
        ("Not at all", "Not at all"),
        ("", ""),
        ("yesterday", "yesterday"),
    ],
)
def test_first_word(text, answer) -> None:
    assert amber.parse_answer(text, "first-word") == answer


def test_no_questions_no_tables() -> None:
    assert discriminative([]) == {}


def test_denominators_start_at_a_thousandth() -> None:
    (table,) = {tuple(row.values()) for row in discriminative([("relation", "no", "No")]).values()}
    assert table == (99.9, 99.9, 99.9, 99.9)


def test_descriptions(tmp_path) -> None:
    task = amber.load(folder(tmp_path), task="all", similarity=similarity, nouns=nouns)
    told = {
        "1": "sky person puppy light table",  # two true things, an expected one; light is safe, table is unknown
        "2": "lawn dog",  # an association of grass, and a dog that nobody expects here
    }
    asked = {"3": "Yes", "4": "No", "5": "No", "6": "No", "7": "Yes"}
    results = run(task, Canned({**told, **asked}), tmp_path / "out")
    figures = results["metrics"]["generative"]
    assert figures == {"CHAIR": 33.3, "Cover": 100.0, "Hal": 100.0, "Cog": 33.3, "Length": 3.5}
    assert {"Length", "yes_ratio", "auroc"} <= {figure["name"] for figure in results["figures"]}
    assert task.parse({"id": "1", "text": told["1"]}).values["length"] == 5
    assert results["metrics"]["AMBER"] == pytest.approx((100 - 33.3 + results["metrics"]["all"]["f1"]) / 2)
    assert task.max_new_tokens == 512
    assert task.protocol["vectors"] == "similarity="


def test_similar_nouns_cover(tmp_path) -> None:
    task = amber.load(folder(tmp_path), task="generative", similarity=similarity, nouns=nouns)
    verdict = task.parse({"id": "1", "text": "tree"})  # close to "man", which is there
    assert verdict.values["hallucinated"] == 0
    assert verdict.values["covered"] == 1
    assert task.parse({"id": "2", "text": "man"}).values["imagined"] == 1  # close to the tree one would expect
    assert generative([])["CHAIR"] == 0.0


def test_descriptions_need_vectors(tmp_path, monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"install spacy and its model nothing_lg.*or run the yes/no questions alone"):
        amber.load(folder(tmp_path), task="generative", nouns=nouns, vectors="nothing_lg")
    monkeypatch.setitem(__import__("sys").modules, "nltk", None)
    with pytest.raises(UsageError, match="install nltk, or pass nouns="):
        amber.load(tmp_path, task="generative", similarity=similarity)


def test_wrong_options(tmp_path) -> None:
    with pytest.raises(UnknownName, match="part of AMBER"):
        amber.load(tmp_path, task="relation")
    with pytest.raises(UnknownName, match="AMBER parser"):
        amber.load(tmp_path, parser="judge")
    assert amber.load(folder(tmp_path)).aggregate({})["warnings"] == ["no answers"]
