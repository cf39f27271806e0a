"""POPE: reading, building, parsing, scoring."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vislm.errors import AnnotationError, UnknownName, UsageError
from vislm.eval.captions.vocabulary import coco_vocabulary
from vislm.eval.questions import pope_answers, pope_build, pope_questions

OBJECTS = {f"{i}.jpg": random.Random(i).sample([f"{c}x" for c in "bcdfghjk"], 4) for i in range(20)}


@given(st.integers(0, 50), st.sampled_from(pope_questions.SPLITS))
def test_built_questions_are_balanced_and_true(seed, split) -> None:
    questions = pope_build.build(OBJECTS, split, random.Random(seed))
    assert len(questions) == 20 * 6
    assert [q.label for q in questions] == ["yes", "no"] * 60
    for q in questions:
        name = q.text.removeprefix("Is there a ").removesuffix(" in the image?")
        assert (name in OBJECTS[q.image]) == (q.label == "yes")
    per_image = [{q.text for q in questions if q.image == i} for i in OBJECTS]
    assert all(len(texts) == 6 for texts in per_image)


def test_popular_negatives_are_the_most_frequent_absent_objects() -> None:
    counts, _ = pope_build.statistics(OBJECTS)
    order = sorted(counts, key=lambda o: -counts[o])
    for image, shown in OBJECTS.items():
        asked = [
            q.text
            for q in pope_build.build(OBJECTS, "popular", random.Random(0))
            if q.image == image and q.label == "no"
        ]
        assert asked == [pope_questions.TEMPLATE.format(o) for o in order if o not in shown][:3]


def test_articles() -> None:
    objects = {"a": ["apple", "bx", "cx"], "b": ["dx", "bx", "cx"]}
    right = [q.text for q in pope_build.build(objects, "popular", random.Random(0), per_image=1)]
    legacy = [q.text for q in pope_build.build(objects, "popular", random.Random(0), per_image=1, legacy_article=True)]
    assert right[0] == "Is there an apple in the image?"
    assert legacy[0] == "Is there an apple in the imange?"


def test_endless_draws_are_noticed() -> None:
    with pytest.raises(UsageError, match="no absent object"):
        pope_build.build({"a": ["x", "y", "z"]}, "random", random.Random(0))
    with pytest.raises(UsageError, match="has 2 objects; POPE needs 3"):
        pope_build.build({"a": ["x", "y"]}, "random", random.Random(0))
    with pytest.raises(UnknownName, match="adversarial"):
        pope_build.build(OBJECTS, "adversary", random.Random(0))


def test_question_files_of_all_kinds(tmp_path) -> None:
    rows = [{"question_id": i + 1, "image": "a.jpg", "text": f"q{i}", "label": "yes"} for i in range(3)]
    path = tmp_path / "q.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [q.text for q in pope_questions.read_questions(path, "random")] == ["q0", "q1", "q2"]
    path.write_text(json.dumps(rows, indent=2))
    assert len(pope_questions.read_questions(path, "random")) == 3
    path.write_text(json.dumps({"image": "a.jpg", "text": ["p", "q"], "label": ["yes", "no"]}) + "\n")
    assert [(q.text, q.label) for q in pope_questions.read_questions(path, "random")] == [("p", "yes"), ("q", "no")]


def test_the_split_comes_from_the_entry_or_the_name_of_the_file(tmp_path) -> None:
    path = tmp_path / "coco_pope_popular.json"
    rows = [{"question_id": 1, "image": "a.jpg", "text": "q", "label": "yes"}]
    path.write_text(json.dumps(rows))
    assert pope_questions.read_questions(path)[0].id == "popular/1"
    rows = [
        {**rows[0], "category": split} for split in pope_questions.SPLITS
    ]  # ids restart in each split of LLaVA's file
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [q.id for q in pope_questions.read_questions(path)] == [f"{split}/1" for split in pope_questions.SPLITS]


def test_images_are_drawn_among_those_with_enough_objects() -> None:
    objects = {**OBJECTS, "poor.jpg": ["bx"]}
    drawn = pope_build.draw_images(objects, 10, random.Random(3))
    assert len(drawn) == 10
    assert "poor.jpg" not in drawn
    assert list(drawn) == list(pope_build.draw_images(objects, 10, random.Random(3)))
    with pytest.raises(UsageError, match="20 images show 3 or more objects; 21"):
        pope_build.draw_images(objects, 21, random.Random(3))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Is there a hot dog in the image?", "hot dog"),
        ("Is there an orange in the imange?", "orange"),
        ("is there a star in the image ?", "star"),
        ("Is there a cat in the image?\nAnswer the question using a single word or phrase.", "cat"),
        ("What is this?", None),
    ],
)
def test_objects_are_read_from_questions(text, name) -> None:
    assert pope_questions.object_of(text) == name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": "a"', "line 1 is not JSON"),
        ("[1, 2", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ('{"image": "../a", "text": "b", "label": "yes"}', "not a file name below the image folder"),
        ('{"image": "a", "text": "b", "label": "maybe"}', "label 'maybe'"),
        ('{"image": "a", "label": "yes"}', "1 faults: entry 1 has no 'text'"),
        ('{"image": 5, "text": "b", "label": "yes"}', "entry 1"),
        ("[1, 2]", "2 faults"),
        ('{"question_id": 1, "image": "a", "text": "b", "label": "yes"}\n' * 2, "not unique"),
    ],
)
def test_faults_in_question_files_are_named(tmp_path, content, message) -> None:
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(AnnotationError, match=message):
        pope_questions.read_questions(path, "random")


@pytest.mark.parametrize(
    ("text", "official", "lmms", "pai", "vlm"),
    [
        ("Yes.", "yes", "wrong", "yes", "yes"),
        ("yes", "yes", "yes", "yes", "yes"),
        ("No, there is not", "no", "wrong", "no", "no"),
        ("There isn't one", "yes", "wrong", "no", "unknown"),
        ("", "yes", "wrong", "dropped", "unknown"),
        ("yes no", "no", "wrong", "no", "unknown"),
    ],
)
def test_parsers(text, official, lmms, pai, vlm) -> None:
    assert [pope_answers.parse(text, r) for r in pope_answers.PARSERS] == [official, lmms, pai, vlm]
    with pytest.raises(UnknownName, match="official"):
        pope_answers.parse(text, "offical")


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30))
def test_auroc_is_the_share_of_ordered_pairs(rows) -> None:
    positive, scores = zip(*rows, strict=True)
    yes, no = [s for a, s in rows if a], [s for a, s in rows if not a]
    pairs = [(p > n) + 0.5 * (p == n) for p in yes for n in no]
    expected = sum(pairs) / len(pairs) if pairs else 0.5
    assert pope_answers.auroc(positive, scores) == pytest.approx(expected)


def test_zero_denominators_are_zero_with_a_warning() -> None:
    result = pope_answers.metrics(["no"], ["no"])
    assert (result["precision"], result["recall"], result["f1"]) == (0.0, 0.0, 0.0)
    assert len(result["warnings"]) == 3
    assert pope_answers.metrics([], [])["accuracy"] == 0.0


def test_answers_that_are_neither() -> None:
    """VLMEvalKit counts them as not yes, so a missed yes lowers the recall; lmms-eval counts them nowhere."""
    labels = ["yes", "yes", "no"]
    unknown = pope_answers.metrics(labels, ["yes", "unknown", "unknown"])
    assert (unknown["recall"], unknown["precision"], unknown["accuracy"]) == (0.5, 1.0, pytest.approx(1 / 3))
    wrong = pope_answers.metrics(labels, ["yes", "wrong", "wrong"])
    assert (wrong["recall"], wrong["accuracy"], wrong["n_unparsed"]) == (1.0, pytest.approx(1 / 3), 2)


@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])), min_size=1, max_size=40))
def test_metrics_follow_from_the_counts(rows) -> None:
    labels, predictions = zip(*rows, strict=True)
    result = pope_answers.metrics(labels, predictions)
    assert result["TP"] + result["FP"] + result["TN"] + result["FN"] == len(rows)
    assert result["yes_ratio"] == pytest.approx((result["TP"] + result["FP"]) / len(rows))
    assert min(result["precision"], result["recall"]) <= result["f1"] + 1e-12
    assert result["f1"] <= max(result["precision"], result["recall"]) + 1e-12


def test_dropped_answers_shrink_n() -> None:
    ranked = pope_answers.metrics(["yes", "no", "no"], ["yes", "dropped", "no"], [1.0, 5.0, 0.0])
    assert ranked["auroc"] == 1.0  # over the answers that count, as the accuracy
    alike = pope_answers.metrics(["yes", "yes"], ["yes", "yes"], [1.0, 5.0])
    assert alike["warnings"] == ["auroc is 0.5 because all its questions have the same right answer"]
    result = pope_answers.metrics(["yes", "no", "yes"], ["yes", "dropped", "wrong"])
    assert (result["n"], result["n_unparsed"], result["accuracy"]) == (2, 2, 0.5)


@pytest.mark.parametrize(("split", "least"), [("popular", 1500), ("adversarial", 1490)])
def test_the_official_questions_are_rebuilt(split, least) -> None:
    """From CHAIR's objects of the 500 images; six adversarial ties depend on an order that was never published."""
    stored = json.loads((Path(__file__).parent / "pope_official.json").read_text(encoding="utf-8"))["images"]
    names = coco_vocabulary().objects
    objects = {image: [names[n] for n in row["objects"]] for image, row in stored.items()}
    built = pope_build.build(objects, split, random.Random(0))
    asked = [(q.image, pope_questions.object_of(q.text)) for q in built if q.label == "no"]
    published = [(image, names[n]) for image, row in stored.items() for n in row[split]]
    assert len(asked) == 1500
    assert sum(a == p for a, p in zip(asked, published, strict=True)) >= least
    counts, _ = pope_build.statistics(objects)
    assert sorted(counts.items(), key=lambda pair: -pair[1])[:4] == [
        ("person", 348),
        ("dining table", 130),
        ("car", 90),
        ("chair", 85),
    ]
