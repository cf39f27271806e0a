"""Questions about scenes, and the oracles."""

from __future__ import annotations

import itertools
import json

import pytest

from vislm.data.scene_categories import CATEGORIES, THEMES, UNIVERSALS
from vislm.eval.benchmarks import load_benchmark
from vislm.eval.questions.scene_pope import STATISTICS, context_oracle, oracle_table, probability, scene_questions

SHOWN = {f"{i}.png": CATEGORIES[i % 12 : i % 12 + 1 + i % 4] for i in range(40)}


def test_splits_share_their_positives_and_are_balanced() -> None:
    questions = scene_questions(SHOWN)
    for image, shown in SHOWN.items():
        splits = [
            [q for q in questions if q.image == image and q.split == s] for s in ("random", "popular", "adversarial")
        ]
        assert all(len(s) == 2 * min(3, len(shown)) for s in splits)
        positives = [[q.text for q in s if q.label == "yes"] for s in splits]
        assert positives[0] == positives[1] == positives[2]
    assert scene_questions(SHOWN) == questions
    assert scene_questions(SHOWN, seed=1) != questions


def test_the_stored_statistics_are_those_of_the_generator() -> None:
    from vislm.data.scenes import co_occurrence, generate_scenes

    stored = json.loads(STATISTICS.read_text(encoding="utf-8"))
    assert stored["categories"] == list(CATEGORIES)
    assert stored["counts"] == co_occurrence(generate_scenes(stored["scenes"], stored["seed"])).tolist()


def test_questions_do_not_depend_on_the_other_images() -> None:
    alone = scene_questions({"7.png": SHOWN["7.png"]})
    assert alone == [q for q in scene_questions(SHOWN) if q.image == "7.png"]


def test_context_oracle_is_bayes_by_enumeration() -> None:
    """Summing the joint probability of the model over all themes, for a few worlds."""

    def joint(present: set[str]) -> float:
        total = 0.0
        for theme, (prior, _) in THEMES.items():
            weight = prior
            for name in CATEGORIES:
                weight *= probability(name, theme) if name in present else 1 - probability(name, theme)
            total += weight
        return total

    for category, others in itertools.product(
        ("star", "fork", "dog"), (["moon"], ["cup", "person"], [], ["boat", "car"])
    ):
        rest = set(others) - {category}
        expected = joint(rest | {category}) / (joint(rest | {category}) + joint(rest))
        assert context_oracle(category, sorted(rest)) == pytest.approx(expected)
    assert context_oracle("dog", []) == pytest.approx(UNIVERSALS["dog"])


def test_oracles_on_scenes_have_the_known_order(scenes) -> None:
    from vislm.data.scenes import generate_scenes

    drawn = list(generate_scenes(400, 13579))
    objects = {str(i): s.present for i, s in enumerate(drawn)}
    themes = {str(i): s.theme for i, s in enumerate(drawn)}
    table = oracle_table(scene_questions(objects), objects, themes)
    context = [table[s]["context_only"]["best_accuracy"] for s in ("random", "popular", "adversarial")]
    assert context == sorted(context, reverse=True)
    assert context == pytest.approx([0.852, 0.706, 0.643], abs=0.04)  # measured in the study of the recipe
    assert table["random"]["context_only"]["auroc"] == pytest.approx(0.917, abs=0.03)
    assert load_benchmark("pope", scenes).aggregate({})["oracles"]
