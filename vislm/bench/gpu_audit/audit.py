"""Compile every Triton kernel for cards that are not there, and hold it against their limits.

Nothing runs. What the audit can see is that a kernel compiles, keeps its numbers in registers, fits into shared memory
and uses the tensor cores; and what a perfect execution of its tiles would take beside one of the problem.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vislm.bench.gpu_audit.cards import CARDS, Bound, ideal_bound, resident_blocks, tile_bound
from vislm.bench.gpu_audit.compile import MachineCode, machine_code
from vislm.errors import UsageError
from vislm.files import atomic_write
from vislm.kernels.backends import triton as kernels
from vislm.kernels.backends.triton.audit_case import TARGETS, AuditCase
from vislm.kernels.backends.triton.availability import installed, interpreted

BEGIN, END = "<!-- gpu-audit: begin -->", "<!-- gpu-audit: end -->"
TILE_SIZES = ("ROWS", "COLUMNS", "BLOCK_M", "BLOCK_N", "TOKENS", "CHANNELS")
"""Compile-time arguments that the table shows: queries by keys of a tile, or tokens by channels."""


@dataclass(frozen=True)
class AuditRow:
    """One kernel with one tile configuration on one card.

    Attributes:
        name: the case's name.
        target: compute capability, times ten.
        tiles: the tile configuration in words.
        problem: what ``ideal`` and ``bound`` are for.
        code: what the compiler made; None if it failed.
        resident: blocks that one multiprocessor holds at once.
        occupancy: their share of the resident warps that a multiprocessor can hold.
        ideal: time bound of the problem.
        bound: time bound of the tiles.
        problems: what is wrong, in words; empty if nothing is.
    """

    name: str
    target: int
    tiles: str
    problem: str
    code: MachineCode | None
    resident: int
    occupancy: float
    ideal: Bound
    bound: Bound
    problems: tuple[str, ...]


def audit_cases(targets: Sequence[int] = TARGETS, match: str = "") -> list[tuple[AuditCase, int]]:
    """Return every shipped kernel configuration and target whose name contains ``match``."""
    pairs = [(case, target) for case in _all_cases() for target in case.targets if target in targets]
    return [(case, target) for case, target in pairs if match in case.name]


def audit_rows(targets: Sequence[int] = TARGETS, *, match: str = "", jobs: int | None = None) -> Iterator[AuditRow]:
    """Yield one row per kernel configuration and target.

    Args:
        targets: compute capabilities times ten, of 80, 90, 100.
        match: audit only the cases whose name contains it.
        jobs: processes that compile, None = one per core; a compiler that crashes takes no more than its process along.

    Raises:
        UsageError: an unknown target, no case, no Triton, or Triton's interpreter is on.
    """
    unknown = set(targets) - set(CARDS)
    if unknown:
        raise UsageError(f"no card is known for the targets {sorted(unknown)}, expected some of {sorted(CARDS)}")
    if interpreted():
        raise UsageError("the audit needs Triton's compiler, but TRITON_INTERPRET is set; unset it")
    if not installed():
        raise UsageError("the audit needs Triton's compiler; install triton")
    pairs = audit_cases(targets, match)
    if not pairs:
        raise UsageError(f"no kernel configuration for {list(targets)} has {match!r} in its name")
    wanted = [(case.name, target) for case, target in pairs]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context) as pool:
        futures = [pool.submit(_row_of, *pair) for pair in wanted]
        for (case, target), future in zip(pairs, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield _row(case, target, "the compiler crashed, in this case or one beside it")


def audit_row(case: AuditCase, target: int) -> AuditRow:
    """Return the row of one case, compiled in this process."""
    try:
        code = machine_code(case, target)
    except UsageError:
        raise
    except Exception as error:  # the compiler's errors have no common base; each is a result of the audit
        return _row(case, target, f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return _row(case, target, code)


def problems(rows: Iterable[AuditRow]) -> list[str]:
    """Return every problem of the rows, one line each; empty if the audit passes."""
    return [f"{row.name}, sm_{row.target}: {problem}" for row in rows for problem in row.problems]


def audit_table(rows: Iterable[AuditRow]) -> str:
    """Return the rows as a Markdown table, between lines that say that nothing has run and how many have problems."""
    rows = list(rows)
    lines = [
        "Compiled ahead of time, **not run**: times are bounds from public peak figures, not measurements.",
        "",
        "| kernel | card | tiles | registers | shared KiB | tensor-core instructions | blocks/SM | occupancy "
        "| tiles' bound | ideal | problem | audit |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        code = row.code
        cells = ["", "", ""]
        if code is not None:
            used = ", ".join(f"{count} {name}" for name, count in code.tensor.items()) or "none"
            cells = [str(code.registers), f"{code.shared / 1024:.0f}", used]
        bound = f"{_time(row.bound.seconds)} ({row.bound.limit})"
        cells = [row.name, f"sm_{row.target}", row.tiles, *cells, str(row.resident), f"{row.occupancy:.0%}", bound]
        cells += [_time(row.ideal.seconds), row.problem, "; ".join(row.problems) or "ok"]
        lines.append(f"| {' | '.join(cells)} |")
    faulty = sum(bool(row.problems) for row in rows)
    lines += ["", f"{len(rows)} configurations, {faulty} with problems."]
    return "\n".join(lines)


def write(table: str, path: str | os.PathLike[str]) -> None:
    """Put the table between the two ``gpu-audit`` comments of a Markdown file.

    Raises:
        UsageError: the file has no such place.
    """
    text = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"{path} has no place for the table; put the lines {BEGIN} and {END} where it belongs")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    with atomic_write(path) as file:
        file.write(f"{before}{BEGIN}\n{table}\n{after}")


@cache
def _all_cases() -> tuple[AuditCase, ...]:
    """Return the cases of every module of the Triton backend that has ``audit_cases``."""
    cases: list[AuditCase] = []
    for found in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(found.name)
        cases += getattr(module, "audit_cases", list)()
    names = [(case.name, target) for case in cases for target in case.targets]
    assert len(set(names)) == len(names), "two audit cases of a card share a name"
    return tuple(cases)


def _row_of(name: str, target: int) -> AuditRow:
    """Return the row of a case by name, as a process of its own sees it."""
    return audit_row(next(case for case, _ in audit_cases((target,), name) if case.name == name), target)


def _row(case: AuditCase, target: int, made: MachineCode | str) -> AuditRow:
    card = CARDS[target]
    code = None if isinstance(made, str) else made
    found = [made] if isinstance(made, str) else _found(case, made, card.shared_per_block)
    resident = 0
    if code is not None:
        resident = resident_blocks(card, code.warps, code.registers, code.shared, code.tensor_memory)
    flops = case.flops if case.tile_flops is None else case.tile_flops
    return AuditRow(
        name=case.name,
        target=target,
        tiles=_tiles(case),
        problem=case.problem,
        code=code,
        resident=resident,
        occupancy=0.0 if code is None else resident * code.warps / 64,
        ideal=ideal_bound(card, case.precision, case.flops, case.bytes),
        bound=tile_bound(card, case.precision, flops, case.bytes, case.exponentials, case.programs, resident),
        problems=tuple(found),
    )


def _found(case: AuditCase, code: MachineCode, shared_limit: int) -> list[str]:
    """Return what is wrong with a compiled case."""
    found: list[str] = []
    if code.stack or code.local or code.spills:
        found.append(f"spills: stack {code.stack} B, local {code.local} B, {code.spills} local loads and stores")
    if code.shared > shared_limit:
        found.append(f"needs {code.shared} B of shared memory, a block may have {shared_limit}")
    if case.tensor_cores and not code.tensor:
        found.append("uses no tensor cores")
    if not case.tensor_cores and code.tensor:
        found.append("uses tensor cores, although none were expected")
    return found


def _tiles(case: AuditCase) -> str:
    sizes = [str(value) for key, value in case.constexprs.items() if key in TILE_SIZES]
    return f"{'x'.join(sizes)}, {case.num_warps} warps, {case.num_stages} stages".removeprefix(", ")


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
