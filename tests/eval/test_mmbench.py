"""MMBench: the table, rotations, reading of options, circular evaluation, likelihoods."""

from __future__ import annotations

import csv

import pytest
from lmm_folders import MMBENCH, Canned, mmbench_rows
from lmm_folders import mmbench as folder

from vislm.errors import AnnotationError, UnknownName, UsageError
from vislm.eval.prompts import LETTER
from vislm.eval.questions import mmbench
from vislm.eval.questions.choice_answers import mmbench_answer
from vislm.eval.questions.mmbench_file import PASS
from vislm.eval.running.runner import run

OPTIONS = {"A": "an apple", "B": "the sky", "C": "cat"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. the sky", "B"),
        ("The answer is (C).", "C"),
        ("A cat is what is shown in it", "C"),  # A is far from the end, the option's text decides
        ("It is either A or B", None),
        ("My answer is C because A and B are wrong", "C"),
        ("the sky", "B"),
        ("THE SKY!", "B"),
        ("an apple in the sky", None),  # two texts
        ("cat " * 20, None),  # too long to be a quoted option
        ("", None),
        ("D", None),
    ],
)
def test_options_are_read_from_free_text(text, letter) -> None:
    assert mmbench_answer(text, OPTIONS) == letter


def test_rotations_keep_the_right_text(tmp_path) -> None:
    task = mmbench.load(folder(tmp_path))
    assert [c.index for c in task.choices] == [
        1,
        PASS + 1,
        2,
        PASS + 2,
        2 * PASS + 2,
        *(3 + p * PASS for p in range(4)),
    ]
    right = {1: "an apple", 2: "cow", 3: "dog"}
    for choice in task.choices:
        assert choice.options[choice.answer] == right[choice.question]
    for question in right:
        turned = [tuple(c.options.values()) for c in task.choices if c.question == question]
        assert len(set(turned)) == len(turned) == len(turned[0])
        assert len({c.answer for c in task.choices if c.question == question}) == len(turned)


def test_circular_counts_questions_right_in_every_rotation(tmp_path) -> None:
    task = mmbench.load(folder(tmp_path))
    always = {str(c.index): c.answer for c in task.choices}
    canned = Canned({**always, str(PASS + 2): "A" if always[str(PASS + 2)] != "A" else "B", str(3): "no idea"})
    results = run(task, canned, tmp_path / "out")
    assert results["metrics"] == {
        "vanilla": pytest.approx(2 / 3),
        "circular": pytest.approx(1 / 3),
        "n": 3,
        "n_unparsed": 1,
    }
    assert results["per_group"]["attribute"] == {"vanilla": 1.0, "circular": 1.0, "n": 1}
    assert results["per_group"]["object"] == {"vanilla": 0.5, "circular": 0.0, "n": 2}
    assert canned.prompts["1"] == "Which is red?\nA. an apple\nB. the sky" + LETTER
    assert canned.prompts["2"] == 'Look.\nWhat "is" it?\nA. cat\nB. dog\nC. cow' + LETTER
    partial = task.aggregate({i: {"id": i, "text": always[i]} for i in ("1", "2")})
    assert "1 questions" not in partial["warnings"][0]
    assert "2 questions are not yet asked in all rotations" in partial["warnings"][0]


def test_vanilla_alone(tmp_path) -> None:
    task = mmbench.load(folder(tmp_path), circular=False, prompt="vlmevalkit")
    assert [s.id for s in task.samples] == ["1", "2", "3"]
    assert task.samples[1].prompt.startswith('Hint: Look.\nQuestion: What "is" it?\nOptions:\nA. cat\n')
    assert "circular" not in task.aggregate({"1": {"id": "1", "text": "A"}})


def test_a_file_that_holds_the_rotations_keeps_them(tmp_path) -> None:
    rows = mmbench_rows()[:1]
    turned = [str(PASS + 1), *rows[0][1:3], "the sky", "an apple", "", "", "B", *rows[0][8:]]
    task = mmbench.load(folder(tmp_path, [*rows, turned]))
    assert [c.index for c in task.choices] == [1, PASS + 1]
    assert task.choices[0].image is task.choices[1].image
    assert [s.id for s in mmbench.load(tmp_path, circular=False).samples] == ["1"]


def test_likelihoods(tmp_path) -> None:
    task = mmbench.load(folder(tmp_path), scoring="likelihood", circular=False)
    assert task.samples[2].choices == ("A", "B", "C", "D")
    assert task.parse({"id": "3", "text": "B", "likelihoods": [-3.0, -1.0, -2.0, -4.0]}).score == 1.0
    assert task.protocol["parser"] == "likelihood"


def test_shared_pictures_are_stored_once(tmp_path) -> None:
    task = mmbench.load(folder(tmp_path))
    assert {s.images[0].name for s in task.samples} == {"image of index 1", "image of index 2"}


def test_secret_answers(tmp_path) -> None:
    rows = mmbench_rows()
    rows[0][7] = ""
    task = mmbench.load(folder(tmp_path, rows[:1]))
    assert task.parse({"id": "1", "text": "A"}).score is None
    assert "official server" in task.aggregate({"1": {"id": "1", "text": "A"}})["warnings"][1]


def test_the_limit_on_cells_is_put_back(tmp_path) -> None:
    before = csv.field_size_limit()
    rows = mmbench_rows()
    rows[0][9] += "A" * 200_000
    mmbench.load(folder(tmp_path, rows))
    assert csv.field_size_limit() == before


def test_wrong_input(tmp_path) -> None:
    with pytest.raises(UnknownName, match="scoring of MMBench"):
        mmbench.load(tmp_path, scoring="guess")
    with pytest.raises(AnnotationError, match=r"must hold one \.tsv table, found none"):
        mmbench.load(tmp_path)
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        mmbench.load(tmp_path / "missing")
    (tmp_path / "x.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(AnnotationError, match="lacks the columns index, question, A, B, image"):
        mmbench.load(tmp_path)
    assert MMBENCH
