"""The audit compiles real kernels, sees what is wrong with bad ones, and prints what it found."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from vislm.bench.gpu_audit import audit as gpu_audit
from vislm.bench.gpu_audit.audit import BEGIN, END, audit_cases, audit_row, audit_rows, audit_table, problems, write
from vislm.bench.gpu_audit.cards import CARDS, Bound, ideal_bound, resident_blocks, tile_bound
from vislm.errors import UsageError
from vislm.kernels.backends.triton.audit_case import AuditCase

interpreted = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the audit needs Triton's compiler")


def case(name: str, target: int) -> AuditCase:
    return next(case for case, _ in audit_cases((target,), name) if case.name == name)


@interpreted
@pytest.mark.parametrize(("target", "instruction"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_forward_uses_the_tensor_cores_of_each_card(target: int, instruction: str) -> None:
    row = audit_row(case("dense forward bf16 D=64", target), target)
    assert row.problems == ()
    assert row.code is not None
    assert row.code.tensor[instruction] > 0
    assert row.code.shared <= CARDS[target].shared_per_block
    assert row.resident >= 1
    assert 0 < row.ideal.seconds <= row.bound.seconds < 1


@interpreted
def test_float32_is_not_rounded_to_tf32() -> None:
    exact = case("dense forward fp32 D=32", 80)
    row = audit_row(exact, 80)
    assert row.problems == ()
    assert row.code is not None
    assert row.code.tensor == {}
    assert audit_row(replace(exact, tensor_cores=True), 80).problems == ("uses no tensor cores",)


@interpreted
def test_a_bad_configuration_is_a_problem() -> None:
    good = case("dense forward bf16 D=64", 80)
    large = {**good.constexprs, "ROWS": 128, "COLUMNS": 128}
    row = audit_row(replace(good, constexprs=large, num_stages=7, tensor_cores=False), 80)
    assert len(row.problems) == 3
    assert row.problems[0].startswith("spills: stack")
    assert "of shared memory, a block may have 166912" in row.problems[1]
    assert row.problems[2] == "uses tensor cores, although none were expected"
    assert row.resident == 0
    assert problems([row])[0].startswith("dense forward bf16 D=64, sm_80: spills")


@interpreted
def test_what_does_not_compile_is_a_problem() -> None:
    good = case("dense delta bf16 D=64", 80)
    row = audit_row(replace(good, constexprs={**good.constexprs, "ROWS": 48}), 80)
    assert row.code is None
    assert "does not compile" in row.problems[0]
    table = audit_table([row])
    assert "does not compile" in table
    assert "1 configurations, 1 with problems" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1  # every row has every column


@interpreted
def test_rows_come_from_processes_and_go_into_a_page(tmp_path) -> None:
    rows = list(audit_rows((80,), match="dense delta bf16 D=32", jobs=1))
    assert {row.name for row in rows} == {case.name for case, _ in audit_cases((80,), "dense delta bf16 D=32")}
    table = audit_table(rows)
    assert "not run" in table
    page = tmp_path / "kernels.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(table, page)
    assert page.read_text() == f"before\n{BEGIN}\n{table}\n{END}\nafter\n"
    page.write_text("no place")
    with pytest.raises(UsageError, match="no place"):
        write(table, page)


def test_every_kernel_and_card_is_audited() -> None:
    names = {(case.name.split(" bf16")[0], target) for case, target in audit_cases() if "bf16 D=64" in case.name}
    kernels = ("forward", "delta", "backward_queries", "backward_keys", "backward_bias", "row_statistics", "received")
    assert {(f"dense {kernel}", target) for kernel in kernels for target in CARDS} <= names


def test_bad_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match=r"\[75\].*80, 90, 100"):
        next(audit_rows((75,)))
    with pytest.raises(UsageError, match="has 'nonsense' in its name"):
        next(audit_rows(match="nonsense"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match="TRITON_INTERPRET"):
        next(audit_rows())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(gpu_audit, "installed", lambda: False)
    with pytest.raises(UsageError, match="install triton"):
        next(audit_rows())


def test_occupancy() -> None:
    card = CARDS[80]
    assert resident_blocks(card, warps=4, registers=128, shared=0, tensor_memory=0) == 4
    assert resident_blocks(card, warps=4, registers=129, shared=0, tensor_memory=0) == 3  # 136 registers each
    assert resident_blocks(card, warps=4, registers=32, shared=40 << 10, tensor_memory=0) == 4
    assert resident_blocks(card, warps=1, registers=16, shared=0, tensor_memory=0) == 32
    assert resident_blocks(card, warps=4, registers=32, shared=200 << 10, tensor_memory=0) == 0
    assert resident_blocks(CARDS[100], warps=4, registers=32, shared=0, tensor_memory=256) == 2


def test_bounds() -> None:
    card = CARDS[90]
    assert ideal_bound(card, "bf16", flops=989e12, bytes=0) == Bound(1.0, "arithmetic")
    assert ideal_bound(card, "fp32", flops=0, bytes=3.35e12) == Bound(1.0, "memory")
    full = tile_bound(card, "bf16", 989e12, 0, 0, programs=264, resident=1)
    assert full == Bound(1.0, "arithmetic")
    started = tile_bound(card, "bf16", 989e12, 0, 0, programs=265, resident=1)  # the last wave has one block
    assert started.seconds == pytest.approx(3 * 132 / 265)
    few = tile_bound(card, "bf16", 989e12, 0, 0, programs=33, resident=2)  # three of four multiprocessors idle
    assert few.seconds == pytest.approx(4.0)
    assert tile_bound(card, "bf16", 1, 0, 1e15, programs=264, resident=1).limit == "exponentials"
    assert tile_bound(card, "bf16", 1, 1, 1, programs=1, resident=0) == Bound(math.inf, "does not fit")
