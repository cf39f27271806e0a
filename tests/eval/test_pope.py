"""POPE: reading, building, parsing, scoring."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vislm.errors import AnnotationError, UnknownName, UsageError
from vislm.eval import pope

OBJECTS = {f"{i}.jpg": random.Random(i).sample([f"{c}x" for c in "bcdfghjk"], 4) for i in range(20)}


@given(st.integers(0, 50), st.sampled_from(pope.SPLITS))
def test_built_questions_are_balanced_and_true(seed, split) -> None:
    questions = pope.build(OBJECTS, split, random.Random(seed))
    assert len(questions) == 20 * 6
    assert [q.label for q in questions] == ["yes", "no"] * 60
    for q in questions:
        name = q.text.removeprefix("Is there a ").removesuffix(" in the image?")
        assert (name in OBJECTS[q.image]) == (q.label == "yes")
    per_image = [{q.text for q in questions if q.image == i} for i in OBJECTS]
    assert all(len(texts) == 6 for texts in per_image)


def test_popular_negatives_are_the_most_frequent_absent_objects() -> None:
    counts, _ = pope.statistics(OBJECTS)
    order = sorted(counts, key=lambda o: -counts[o])
    for image, shown in OBJECTS.items():
        asked = [q.text for q in pope.build(OBJECTS, "popular", random.Random(0)) if q.image == image and q.label == "no"]
        assert asked == [pope.TEMPLATE.format(o) for o in order if o not in shown][:3]


def test_articles() -> None:
    objects = {"a": ["apple", "bx", "cx"], "b": ["dx", "bx", "cx"]}
    right = [q.text for q in pope.build(objects, "popular", random.Random(0), per_image=1)]
    legacy = [q.text for q in pope.build(objects, "popular", random.Random(0), per_image=1, legacy_article=True)]
    assert right[0] == "Is there an apple in the image?"
    assert legacy[0] == "Is there an apple in the imange?"


def test_endless_draws_are_noticed() -> None:
    with pytest.raises(UsageError, match="no absent object"):
        pope.build({"a": ["x", "y", "z"]}, "random", random.Random(0))
    with pytest.raises(UsageError, match="has 2 objects; POPE needs 3"):
        pope.build({"a": ["x", "y"]}, "random", random.Random(0))
    with pytest.raises(UnknownName, match="adversarial"):
        pope.build(OBJECTS, "adversary", random.Random(0))


def test_question_files_of_all_kinds(tmp_path) -> None:
    rows = [{"question_id": i + 1, "image": "a.jpg", "text": f"q{i}", "label": "yes"} for i in range(3)]
    path = tmp_path / "q.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [q.text for q in pope.read_questions(path, "random")] == ["q0", "q1", "q2"]
    path.write_text(json.dumps(rows, indent=2))
    assert len(pope.read_questions(path, "random")) == 3
    path.write_text(json.dumps({"image": "a.jpg", "text": ["p", "q"], "label": ["yes", "no"]}) + "\n")
    assert [(q.text, q.label) for q in pope.read_questions(path, "random")] == [("p", "yes"), ("q", "no")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": "a"', "not JSON lines"),
        ('{"image": "a", "text": "b", "label": "maybe"}', "label 'maybe'"),
        ('{"image": "a", "label": "yes"}', "1 faults: entry 1: KeyError"),
        ('{"image": 5, "text": "b", "label": "yes"}', "entry 1"),
        ("[1, 2]", "2 faults"),
        ('{"question_id": 1, "image": "a", "text": "b", "label": "yes"}\n' * 2, "not unique"),
    ],
)
def test_faults_in_question_files_are_named(tmp_path, content, message) -> None:
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(AnnotationError, match=message):
        pope.read_questions(path, "random")


@pytest.mark.parametrize(
    ("text", "official", "lmms", "pai", "vlm"),
    [
        ("Yes.", "yes", "wrong", "yes", "yes"),
        ("yes", "yes", "yes", "yes", "yes"),
        ("No, there is not", "no", "wrong", "no", "no"),
        ("There isn't one", "yes", "wrong", "no", "wrong"),
        ("", "yes", "wrong", "dropped", "wrong"),
        ("yes no", "no", "wrong", "no", "wrong"),
    ],
)
def test_parsers(text, official, lmms, pai, vlm) -> None:
    assert [pope.parse(text, r) for r in pope.PARSERS] == [official, lmms, pai, vlm]
    with pytest.raises(UnknownName, match="official"):
        pope.parse(text, "offical")


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30))
def test_auroc_is_the_share_of_ordered_pairs(rows) -> None:
    positive, scores = zip(*rows, strict=True)
    pairs = [(p > n) + 0.5 * (p == n) for p, a in zip(scores, positive) if a for n, b in zip(scores, positive) if not b]
    expected = sum(pairs) / len(pairs) if pairs else 0.5
    assert pope.auroc(positive, scores) == pytest.approx(expected)


def test_zero_denominators_are_zero_with_a_warning() -> None:
    result = pope.metrics(["no"], ["no"])
    assert (result["precision"], result["recall"], result["f1"]) == (0.0, 0.0, 0.0)
    assert len(result["warnings"]) == 3
    assert pope.metrics([], [])["accuracy"] == 0.0


def test_dropped_answers_shrink_n() -> None:
    result = pope.metrics(["yes", "no", "yes"], ["yes", "dropped", "wrong"])
    assert (result["n"], result["n_unparsed"], result["accuracy"]) == (2, 2, 0.5)
