"""What a difference between two runs means: made-up intervals, and whole runs on the command line."""

from __future__ import annotations

import pytest

from vislm.eval.compare import Comparison
from vislm.eval.effects import effect, notes
from vislm.eval.protocol import Figure
from vislm.eval.uncertainty import Difference

KINDS = {"CHAIR_i": "lower", "CHAIR": "lower", "yes_ratio": "neither", "Length": "neither"}


def differ(name: str, a: float, b: float, width: float = 0.01, *, part: str = "all", n: int = 100) -> Comparison:
    """A figure that is ``a`` in run A and ``b`` in run B, with an interval of that half width."""
    d = a - b
    found = Difference(d, d - width, d + width, 0.5, 3, 2, 0.5)
    return Comparison(part, Figure(name, better=KINDS.get(name, "higher")), n, a, 0.01, b, 0.01, found)  # pyright: ignore[reportArgumentType]


def named(*found: Comparison) -> dict[str, Comparison]:
    return {c.figure.name: c for c in found}


FEWER = "captions: names fewer objects, wrong and right"
SAME_AUROC = differ("auroc", 0.967, 0.967)
ANSWERS = [
    ([differ("accuracy", 0.91, 0.88), differ("auroc", 0.98, 0.96)], "answers: helps"),
    ([differ("accuracy", 0.91, 0.88), SAME_AUROC], "answers: shifts the threshold"),
    ([differ("accuracy", 0.91, 0.88), differ("auroc", 0.94, 0.96)], "answers: shifts the threshold"),
    ([differ("accuracy", 0.91, 0.88)], "answers: more are right, without AUROC"),
    ([differ("accuracy", 0.85, 0.88), SAME_AUROC], "answers: shifts the threshold for the worse"),
    ([differ("accuracy", 0.85, 0.88), differ("auroc", 0.94, 0.96)], "answers: hurts"),
    ([differ("accuracy", 0.85, 0.88)], "answers: fewer are right, without AUROC"),
    ([differ("accuracy", 0.881, 0.88), differ("auroc", 0.98, 0.96)], "answers: better ranked, accuracy not changed"),
    ([differ("accuracy", 0.881, 0.88), SAME_AUROC], "no difference beyond chance"),
]
CAPTIONS = [
    ([differ("CHAIR_i", 0.1, 0.2), differ("Recall", 0.7, 0.7), differ("Length", 50, 50, 2)], "captions: helps"),
    ([differ("CHAIR_i", 0.1, 0.2), differ("Recall", 0.6, 0.7), differ("Length", 50, 50, 2)], FEWER),
    ([differ("CHAIR_i", 0.1, 0.2), differ("Recall", 0.7, 0.7), differ("Length", 40, 50, 2)], "captions: says less"),
    (
        [differ("CHAIR_i", 0.1, 0.2), differ("Recall", 0.7, 0.7), differ("Length", 70, 50, 2)],
        "captions: fewer hallucinations at another length",
    ),
    ([differ("CHAIR_i", 0.3, 0.2), differ("Recall", 0.7, 0.7)], "captions: hurts"),
    ([differ("CHAIR_i", 0.3, 0.2), differ("Recall", 0.8, 0.7)], "captions: says more, right and wrong"),
    ([differ("CHAIR_i", 0.2, 0.2), differ("Recall", 0.8, 0.7)], "captions: names more objects"),
    ([differ("CHAIR", 0.1, 0.2), differ("Cover", 0.6, 0.7)], FEWER),
]


@pytest.mark.parametrize(("found", "words"), ANSWERS)
def test_answers(found, words) -> None:
    assert str(effect(named(*found), {})) == words


@pytest.mark.parametrize(("found", "words"), CAPTIONS)
def test_captions(found, words) -> None:
    assert str(effect({}, named(*found))) == words


def test_both_stand_side_by_side() -> None:
    assert str(effect(named(*ANSWERS[0][0]), named(*CAPTIONS[1][0]))) == f"answers: helps; {FEWER}"


@pytest.mark.parametrize(("a", "b", "named_run"), [(0.91, 0.88, "A"), (0.88, 0.91, "B")])
def test_a_threshold_shift_is_noted_for_the_run_that_gains(a, b, named_run) -> None:
    (note,) = notes([differ("accuracy", a, b), differ("yes_ratio", 0.5, 0.45), SAME_AUROC])
    assert note.startswith(f"{named_run} has the higher accuracy (+0.030), but not the higher AUROC (")
    assert "threshold" in note


@pytest.mark.parametrize(
    "found",
    [
        [differ("accuracy", 0.91, 0.88), differ("yes_ratio", 0.5, 0.45), differ("auroc", 0.98, 0.96)],
        [differ("accuracy", 0.881, 0.88), differ("yes_ratio", 0.5, 0.45), SAME_AUROC],
        [differ("accuracy", 0.91, 0.88)],  # such as GQA's: no yes-no questions
        [differ("accuracy", 0.88, 0.88, 0.0), differ("yes_ratio", 0.4, 0.5), SAME_AUROC],  # ten points, not more
        [differ("CHAIR_i", 0.1, 0.2), differ("Recall", 0.7, 0.7), differ("Length", 65, 50, 20)],  # 30 %, not more
        [differ("CHAIR_i", 0.1, 0.2), differ("Recall", 0.7, 0.7), differ("Length", 0, 0)],
        [differ("accuracy", 0.5, 0.5), differ("yes_ratio", 0.9, 0.5, part="random"), SAME_AUROC],
        [],
    ],
)
def test_nothing_is_noted_where_nothing_is_wrong(found) -> None:
    assert notes(found) == []


@pytest.mark.parametrize(("a", "b"), [(0.62, 0.5), (0.5, 0.62)])
def test_another_share_of_yes_is_noted(a, b) -> None:
    better = [differ("accuracy", 0.91, 0.88), differ("auroc", 0.98, 0.96)]
    (note,) = notes([*better, differ("yes_ratio", a, b)])
    assert note == (
        f"The share of yes moves by 12.0 points (A {a:.3f}, B {b:.3f}), more than 10: accuracy alone shows no gain."
    )


def test_without_auroc_a_gain_in_yes_no_questions_is_noted() -> None:
    (note,) = notes([differ("accuracy", 0.91, 0.88), differ("yes_ratio", 0.5, 0.5)])
    assert "without AUROC" in note


@pytest.mark.parametrize(
    ("a", "b", "chair", "words"),
    [
        (66, 50, (0.1, 0.2), "A's descriptions are 32 % longer"),
        (50, 66, (0.2, 0.1), "B's descriptions are 32 % longer"),
        (34, 50, (0.1, 0.2), "A's descriptions are 32 % shorter"),
        (50, 34, (0.2, 0.1), "B's descriptions are 32 % shorter"),
        (66, 50, (0.2, 0.2), "A's descriptions are 32 % longer"),
    ],
)
def test_another_length_is_noted_for_the_run_that_hallucinates_less(a, b, chair, words) -> None:
    found = notes([differ("CHAIR_i", *chair), differ("Recall", 0.7, 0.7), differ("Length", a, b, 100)])
    assert len(found) == 1
    assert found[0].startswith(words)
    assert found[0].endswith("more than 30 %: CHAIR_i alone shows no gain.")


def test_saying_less_is_noted() -> None:
    (note,) = notes([differ("CHAIR_i", 0.2, 0.1), differ("Recall", 0.7, 0.6), differ("Length", 50, 45, 1)])
    assert note == "B hallucinates less (CHAIR_i), but also says less than A: compare recall and length."
