"""The benchmark of head methods: its cases, its turns, its figures."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vislm import attach, registry
from vislm.bench.heads import measure as measuring
from vislm.bench.heads.cases import CASES, case, hallucination_heads, sink_heads, spread_heads
from vislm.bench.heads.measure import Group, Measured, answer, groups_of, measure
from vislm.bench.heads.rows import Row
from vislm.bench.heads.run import Bench, head_lines
from vislm.bench.pruning.model import Subject, build
from vislm.errors import UnknownName, UsageError

SMALL: dict[str, Any] = {
    "vision_hidden_size": 32,
    "vision_intermediate_size": 48,
    "vision_num_attention_heads": 2,
    "vision_image_size": 64,
    "vision_patch_size": 8,
    "text_hidden_size": 32,
    "text_intermediate_size": 40,
    "text_num_attention_heads": 4,
    "text_num_key_value_heads": 2,
}


@lru_cache
def subject() -> Subject:
    torch.manual_seed(0)
    return build(64, tower_layers=3, layers=5, **SMALL)


def test_every_head_method_that_can_be_attached_is_measured() -> None:
    measured = {case.build(subject().adapter).name for case in CASES.values()}
    assert measured == set(registry.names("heads")) - {"carve"}


@pytest.mark.parametrize("name", CASES)
def test_every_case_has_something_to_do(name: str) -> None:
    with attach(subject().model, CASES[name].build(subject().adapter)) as session:
        plan = session.plan
        assert plan.heads or plan.edits or plan.logits or plan.search
    found = answer(subject(), CASES[name], 3)
    assert len(found.steps) == 3
    assert min(found.prefill, found.tower, *found.steps) > 0


def test_heads_are_spread_over_the_layers() -> None:
    adapter = subject().adapter
    assert len(hallucination_heads(adapter)) == 1  # of 20, as 20 are of 1024
    heads = spread_heads(adapter, 10)
    assert len(set(heads)) == 10
    assert {layer for layer, _ in heads} == set(range(5))
    assert [layer for layer, _ in sink_heads(adapter)] == [2, 3]
    assert len(spread_heads(adapter, 99)) == len(set(spread_heads(adapter, 99))) == 20


def test_turns(monkeypatch) -> None:
    """Cases that decode alike take turns with a model that decodes so, and odd rounds run backwards."""
    groups = groups_of({name: case(name) for name in ("vhr", "opera", "var", "pai", "spin")})
    assert [list(group.cases) for group in groups] == [["vhr", "var", "pai"], ["opera"], ["spin"]]
    assert [group.options for group in groups] == [{}, {"num_beams": 5}, {}]
    seen: list[Any] = []

    def note(subject, case, steps, options=None) -> Measured:
        seen.append(options if case is None else case)
        return Measured(1.0, 2.0, [3.0])

    monkeypatch.setattr(measuring, "answer", note)
    monkeypatch.setattr(measuring, "memory_growth", lambda call, device: (call(), 100))
    measure(subject(), groups[:2], 2, 1, time.perf_counter() + 60)
    first, beams = ([g.options, *g.cases.values()] for g in groups[:2])
    assert seen == [*first, *beams, *first, *beams, *reversed(first), *reversed(beams)]
    seen.clear()
    late = groups_of({"vhr": case("vhr")})
    measure(subject(), late, 5, 1, time.perf_counter())
    assert len(late[0].untouched) == len(late[0].rounds["vhr"]) == 1


def test_figures_and_limits() -> None:
    def one(prefill: float, *steps: float) -> Measured:
        return Measured(1.0, prefill, [9.0, 9.0, *steps])

    group = Group(
        {"vhr": CASES["vhr"], "vcd": CASES["vcd"]},
        [one(2.0, 1.0, 1.0, 5.0), one(4.0, 2.0), one(2.0, 1.0)],
        [0.2, 0.2, 0.1],
        {"vhr": [one(2.1, 1.01), one(4.1, 2.04), one(2.3, 1.0)], "vcd": [one(4.0, 3.0)] * 2},
        100,
        {"vhr": 130, "vcd": None},
    )
    row = Row.of("vhr", group)
    assert (row.rounds, row.extra_bytes, row.generate) == (3, 30, "")
    assert row.step == pytest.approx(1.01)  # of 1.01, 1.02 and 1.0
    assert row.prefill == pytest.approx(1.05)
    assert row.text_prefills == pytest.approx(0.5)  # of 0.5, 0.5 and 3
    assert row.misses() == []
    slow = Row(**{**row.__dict__, "step": 1.03, "text_prefills": 1.2})
    assert len(slow.misses() or []) == 2
    other = Row.of("vcd", group)
    assert (other.rounds, other.step, other.extra_bytes, other.misses()) == (2, 2.25, None, None)


def test_the_whole_benchmark(tmp_path) -> None:
    small = {"tower_layers": 3, "layers": 5, "sizes": SMALL, "steps": 4, "rounds": 2, "threads": 1}
    bench = Bench(64, ("vhr", "pai", "opera"), dtypes=("float32", "bfloat16"), **small)
    lines = list(head_lines(bench, tmp_path / "heads.json"))
    tables = [line for line in lines if line.startswith("method")]
    assert [len(table.splitlines()) for table in tables] == [2 + 3] * 2
    assert sum("within all limits" in line for line in lines) == 2
    saved = json.loads((tmp_path / "heads.json").read_text())
    assert [row["method"] for row in saved["rows"]["bfloat16"]] == ["vhr", "pai", "opera"]
    assert all(row["step"] > 0 and row["rounds"] == 2 for rows in saved["rows"].values() for row in rows)


def test_the_command(monkeypatch, tmp_path) -> None:
    from vislm.bench.heads import run
    from vislm.cli.bench import app

    seen: list[Any] = []
    monkeypatch.setattr(run, "head_lines", lambda bench, out: seen.append((bench, out)) or iter(["done"]))
    target = tmp_path / "h.json"
    options = ["--methods", "vhr,pai", "--dtypes", "float32", "--steps", "8", "--layers", "6", "--threads", "1"]
    result = CliRunner().invoke(app, ["heads", *options, "--json", str(target)])
    assert (result.exit_code, result.output) == (0, "done\n")
    wanted = Bench(methods=("vhr", "pai"), dtypes=("float32",), steps=8, layers=6, threads=1)
    assert seen == [(wanted, target)]
    CliRunner().invoke(app, ["heads"])
    assert seen[1] == (Bench(), None)


def test_bad_input() -> None:
    with pytest.raises(UnknownName, match="did you mean 'spin'"):
        Bench(methods=("spinn",)).check()
    with pytest.raises(UsageError, match="at least one of each"):
        Bench(steps=0).check()
    with pytest.raises(UsageError, match="bfloat16"):
        Bench(dtypes=("int8",)).check()
