"""The checks of the scorers' fixtures notice every changed number, and know what they do not know."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, read_fixture

FOLDER = Path(__file__).parents[1] / "golden"
CASES = sorted(
    f"{p.parent.name}/{p.stem}" for m in ("amber", "coco_caption", "vqa") for p in (FOLDER / m).glob("*.json")
)


def _run(case: str, data: dict[str, Any] | None = None) -> list[Comparison]:
    fixture = read_fixture(FOLDER / f"{case}.json")
    if data is not None:
        fixture.data = data
    outcomes = list(import_module(f"vislm.golden.checks.{case.partition('/')[0]}").check(fixture))
    return [c for c in outcomes if not isinstance(c, Skipped)]


@pytest.mark.parametrize("case", CASES)
def test_fixtures_pass(case) -> None:
    outcomes = _run(case)
    assert outcomes
    assert [c for c in outcomes if not c.passed] == []


CHANGES: dict[str, list[Callable[[dict], Any]]] = {
    "amber/discriminative_300": [
        lambda d: d["official_stdout"].__setitem__(1, "Accuracy:\t 82.4"),
        lambda d: d["official_stdout"].__setitem__(9, "Recall:\t\t 78.8"),
        lambda d: d["official_stdout"].pop(40),
        lambda d: d["items"][0].update(response="yes"),
    ],
    "coco_caption/human_loo_79": [
        lambda d: d["scores"].update(Bleu_4=d["scores"]["Bleu_4"] + 2e-6),
        lambda d: d["scores"].update(CIDEr=d["scores"]["CIDEr"] + 2e-6),
        lambda d: d["scores"].update(ROUGE_L=d["scores"]["ROUGE_L"] - 2e-6),
        lambda d: d["per_image"]["Bleu_1"].__setitem__(78, 0.5),
        lambda d: d["per_image"]["CIDEr"].__setitem__(0, 0.6),
    ],
    "vqa/answer_normalisation": [
        lambda d: d["normalise"][0].__setitem__(1, "A dog"),
        lambda d: d["textvqa"][2].update(score=1.0),
    ],
    "vqa/contractions": [lambda d: d["contractions"].update(dont="do not")],
    "vqa/mme": [
        lambda d: d["items"][0].update(parsed="no"),
        lambda d: d["items"][0].update(score=1.0),
        lambda d: d["totals"].update(mme_perception_score=204.2),
        lambda d: d["per_category"].__setitem__(0, "existence: 0.01"),
    ],
    "vqa/scienceqa_parsing": [
        lambda d: d["items"][0].update(llava_answer="B"),
        lambda d: d["items"][0].update(lmms_eval_score=[0.0] * 5),
    ],
}


@pytest.mark.parametrize(("case", "number"), [(c, i) for c, changes in CHANGES.items() for i in range(len(changes))])
def test_any_changed_output_is_noticed(case, number) -> None:
    data = copy.deepcopy(json.loads((FOLDER / f"{case}.json").read_text()))
    CHANGES[case][number](data)
    assert any(not c.passed for c in _run(case, data))


def test_every_case_is_changed() -> None:
    assert CHANGES.keys() == set(CASES)


@pytest.mark.parametrize("name", ["amber", "coco_caption", "vqa"])
def test_other_fixtures_are_unknown(name) -> None:
    fixture = Fixture(Path("x.json"), name, "", {}, data={"meta": {}, "mystery": 1})
    with pytest.raises(Unhandled, match="no known"):
        list(import_module(f"vislm.golden.checks.{name}").check(fixture))
