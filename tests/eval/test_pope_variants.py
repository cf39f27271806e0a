"""POPE's parsers and prompt suffixes, in Python and by text, stored with the run."""

from __future__ import annotations

import json

import pytest
from lmm_folders import Canned
from lmm_folders import pope as folder

from vislm.errors import UnknownName
from vislm.eval import pope, pope_variants
from vislm.eval.lmm_benchmarks import load, read_options
from vislm.eval.prompts import SUFFIXES
from vislm.eval.runner import run

ANSWERS = ["Yes", "NO", "I can't tell", "yes.", "maybe", "No, there is not", "yes or no"]


@pytest.mark.parametrize("parser", pope.PARSERS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_variant_is_asked_and_stored(parser, suffix, tmp_path) -> None:
    task = load("pope", folder(tmp_path), parser=parser, suffix=suffix)
    canned = Canned({s.id: "Yes" if s.truth == "yes" else "No" for s in task.samples})
    results = run(task, canned, tmp_path / "out")
    assert results["metrics"]["mean"]["f1"] == 1.0
    assert (results["config"]["protocol.parser"], results["config"]["protocol.suffix"]) == (parser, suffix)
    assert all(prompt.endswith("?" + SUFFIXES[suffix]) for prompt in canned.prompts.values())
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    assert stored["protocol.suffix"] == suffix


@pytest.mark.parametrize(
    ("parser", "expected"),
    [
        ("official", ["yes", "yes", "yes", "yes", "yes", "no", "no"]),
        ("lmms-eval", ["yes", "no", "wrong", "wrong", "wrong", "wrong", "wrong"]),
        ("pai", ["yes", "no", "no", "yes", "dropped", "no", "no"]),
        ("vlmevalkit", ["yes", "no", "unknown", "yes", "unknown", "no", "unknown"]),
    ],
)
def test_the_parsers_disagree_as_documented(parser, expected) -> None:
    assert [pope.parse(text, parser) for text in ANSWERS] == expected


def test_ids_do_not_depend_on_the_suffix(tmp_path) -> None:
    plain, short = (load("pope", folder(tmp_path), suffix=s) for s in ("none", "short"))
    assert [s.id for s in plain.samples] == [s.id for s in short.samples]
    assert plain.groups({}) == {}


def test_by_text(tmp_path) -> None:
    assert read_options("pope", "parser=pai, suffix=short,seed=3") == {"parser": "pai", "suffix": "short", "seed": 3}
    with pytest.raises(UnknownName, match="did you mean 'parser'"):
        read_options("pope", "parsr=pai")
    with pytest.raises(UnknownName, match="POPE parser"):
        load("pope", folder(tmp_path), parser="oficial")
    with pytest.raises(UnknownName, match="prompt suffix"):
        load("pope", tmp_path, suffix="long")


def test_built_questions_have_variants_too(scenes) -> None:
    task = pope_variants.load(scenes, parser="pai", suffix="short", seed=1)
    assert task.protocol["questions"] == "scenes, seed 1"
    assert task.samples[0].prompt.endswith("word or phrase.")
    assert pope_variants.suspicions(task) == []
