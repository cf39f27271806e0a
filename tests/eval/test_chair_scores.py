"""CHAIR beyond the fixtures."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vislm.data.scene_categories import CATEGORIES
from vislm.data.scenes import generate_scenes
from vislm.data.turns import caption, plural
from vislm.errors import AnnotationError, UsageError
from vislm.eval.captions import chair_scores as chair
from vislm.eval.captions.singularize import singularize
from vislm.eval.captions.vocabulary import coco_vocabulary, vocabulary_of


def test_the_generator_s_own_captions_score_perfectly() -> None:
    vocabulary = vocabulary_of(CATEGORIES)
    scores = [chair.score_caption(caption(s), s.present, vocabulary) for s in generate_scenes(60, 3)]
    result = chair.overall(scores)
    assert (result["CHAIR_i"], result["CHAIR_s"], result["Recall"]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("name", CATEGORIES)
def test_plurals_of_scene_categories_are_found(name) -> None:
    assert chair.mentions(f"there are two red {plural(name)} .", vocabulary_of(CATEGORIES)).nodes == [name]


def test_names_that_the_singulariser_spoils_are_found_all_the_same() -> None:
    vocabulary = vocabulary_of(["bus", "traffic light", "glass"])
    text = "a bus, two buses, a glass and glasses near traffic lights and a traffic light"
    assert chair.mentions(text, vocabulary).nodes == ["bus"] * 2 + ["glass"] * 2 + ["traffic light"] * 2
    with pytest.raises(UsageError, match="has 3 words"):
        vocabulary_of(["stove top oven"])


def test_figures_of_each_object() -> None:
    scores = [chair.score_caption("a cat and a dog", {"dog", "bird"}, coco_vocabulary())]
    table = chair.by_object(scores)
    assert table["cat"] == {"mentions": 1, "hallucinated": 1, "images": 0, "recall": 0.0}
    assert table["dog"] == {"mentions": 1, "hallucinated": 0, "images": 1, "recall": 1.0}
    assert table["bird"] == {"mentions": 0, "hallucinated": 0, "images": 1, "recall": 0.0}


def test_repeated_mentions_count_each_time() -> None:
    score = chair.score_caption("a cat, a cat and a dog.", {"dog"}, coco_vocabulary())
    assert score.hallucinated == [("cat", "cat")] * 2
    assert score.chair_i == pytest.approx(2 / 3)
    assert chair.overall([score])["CHAIR_i"] == pytest.approx(2 / 3)


def test_f1_counts_each_object_once_per_caption() -> None:
    once, thrice = (
        chair.score_caption(t, {"dog", "cup"}, coco_vocabulary()) for t in ("a dog, a cat", "a dog, a dog and a dog")
    )
    precision, recall = 1 / 2, 1 / 2
    assert chair.overall([once])["F1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert chair.overall([once, thrice])["F1"] == pytest.approx(4 / 7)


def test_no_mentions_and_no_truth() -> None:
    result = chair.overall([chair.score_caption("", set(), coco_vocabulary())])
    assert (result["CHAIR_i"], result["Recall"], len(result["warnings"])) == (0.0, 0.0, 2)
    assert chair.overall([])["n"] == 0


def test_truth_joins_instances_and_captions() -> None:
    truth = chair.ground_truth({1: ["dog"]}, {1: ["a man on a motorcycle"], 2: ["a bus"]}, coco_vocabulary())
    assert truth == {1: {"dog", "person", "motorcycle"}, 2: set()}  # "bus" is singularised to "bu": official


def test_object_tables(tmp_path) -> None:
    path = tmp_path / "table.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"7": [1, 3]}).encode()))
    assert chair.read_object_table(path, coco_vocabulary()) == {7: {"person", "car"}}
    whole = path.read_bytes()
    for content, message in (
        (b"junk", "cannot read"),
        (whole[:-9], "cannot read"),
        (gzip.compress(b"[]"), "expected a dict"),
        (gzip.compress(b'{"7": [999], "x": [1]}'), "2 faults: table.json.gz: image 7 has .999.; expected a list"),
    ):
        path.write_bytes(content)
        with pytest.raises(AnnotationError, match=message):
            chair.read_object_table(path, coco_vocabulary())
    faults: list[str] = []
    path.write_bytes(gzip.compress(b'{"7": [999], "8": [1], "x": [1], "9": 3, "10": [true]}'))
    assert chair.read_object_table(path, coco_vocabulary(), faults) == {8: {"person"}}
    assert [fault.split()[1:3] for fault in faults] == [["image", "7"], ["key", "'x'"], ["image", "9"], ["image", "10"]]


@given(st.text(max_size=60))
def test_any_text_can_be_scored(text) -> None:
    found = chair.mentions(text, coco_vocabulary())
    assert len(found.words) == len(found.nodes) == len(found.indices)
    assert all(singularize(w) is not None for w in found.tokens)
