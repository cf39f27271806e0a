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
    assert metrics["all"] == {"accuracy": 60.0, "precision": 100.0, "recall": 66.6, "f1": 79.9}
    assert metrics["existence"] == {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert metrics["state"]["accuracy"] == 100.0
    assert (metrics["n_normalised"], metrics["n_unparsed"], metrics["n"]) == (2, 1, 5)
    assert "number" not in metrics
    assert canned.prompts["3"].startswith("Is it 0?\nAnswer the question")


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
    assert figures == {"CHAIR": 33.3, "Cover": 100.0, "Hal": 100.0, "Cog": 33.3}
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
