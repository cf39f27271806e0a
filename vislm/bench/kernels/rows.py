"""The measured figures, and the tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log

import torch

from vislm.bench.kernels.cases import Case, Setting, Skip, allowed_pairs, pattern_of
from vislm.bench.kernels.memory import peak_memory
from vislm.bench.kernels.plan import DIRECTIONS, Direction, calls_of, cases_of
from vislm.bench.kernels.statistics import STATISTICS
from vislm.bench.kernels.timing import MATMUL, interleaved, matmul_call, matmul_rate
from vislm.report.units import bytes_text, milliseconds_text


@dataclass(frozen=True)
class Row:
    """One case of one setting in one direction; bytes are None where they are not known.

    Attributes:
        pattern: the setting's pattern.
        grid: its grid.
        tokens: tokens of the grid.
        case: name of the case.
        against: the case of ours that it is compared with; None for our own.
        direction: "forward" (inference), or "training": forward and backward.
        seconds: median.
        fastest: the fastest round, which suits a machine that others use.
        time_ratio: its seconds over those of ``against``.
        peak: peak bytes beyond query, key and value.
        memory_ratio: its peak over that of ``against``.
        flops_per_second: FLOPs of the exact pattern (2 products forward, 4 more backward) over ``seconds``.
        matmul_share: that over the rate of a large matrix product in the same rounds.
        difference: largest absolute difference of its output from that of ``against``.
    """

    pattern: str
    grid: tuple[int, ...]
    tokens: int
    case: str
    against: str | None
    direction: Direction
    seconds: float
    fastest: float
    time_ratio: float | None
    peak: int | None
    memory_ratio: float | None
    flops_per_second: float
    matmul_share: float
    difference: float | None


@dataclass(frozen=True)
class Measured:
    """All rows of one setting, what was skipped, and the machine's FLOP/s in matrix products."""

    setting: Setting
    rows: list[Row]
    skipped: list[Skip]
    matmul: float


def measure(setting: Setting, runs: int, budget: float, memory: bool) -> Measured:
    """Return times, peaks, rates and differences of all cases of a setting.

    Args:
        setting: the problem.
        runs: interleaved rounds at most.
        budget: seconds after which no further round starts.
        memory: also measure peaks, in a fresh process.
    """
    found = list(cases_of(setting))
    cases = [case for case in found if isinstance(case, Case)]
    differences, failed = _first_runs(cases)
    cases = [case for case in cases if case.name not in failed]
    skipped = [case for case in found if isinstance(case, Skip)]
    skipped += [Skip(name, reason) for name, reason in failed.items()]
    skipped += [Skip(f"{case.name}, backward", case.no_backward) for case in cases if case.no_backward]
    peaks = peak_memory(setting) if memory else {}
    rows: list[Row] = []
    rates = []
    for direction in DIRECTIONS:
        calls = calls_of(cases, direction)
        if not calls:
            continue
        calls[MATMUL] = matmul_call(setting.device, getattr(torch, setting.dtype))
        rounds = interleaved(calls, runs, budget, setting.device)
        rates.append(matmul_rate(statistics.median(rounds.pop(MATMUL))))
        peak = {name: figures[direction] for name, figures in peaks.items() if direction in figures}
        measured = [case for case in cases if case.name in rounds]
        rows += [
            _row(setting, case, direction, rounds, peak, rates[-1], differences.get(case.name)) for case in measured
        ]
    return Measured(setting, rows, skipped, statistics.median(rates))


def table_rows(measured: Measured) -> Iterator[dict[str, str]]:
    """Yield the rows of a table: one per case, forward and training side by side."""
    by_case: dict[str, dict[Direction, Row]] = {}
    for row in measured.rows:
        by_case.setdefault(row.case, {})[row.direction] = row
    for name, directions in by_case.items():
        line = {"case": name}
        for direction, label in zip(DIRECTIONS, ("fwd", "fwd+bwd"), strict=True):
            row = directions.get(direction)
            line |= {
                label: "-" if row is None else milliseconds_text(row.seconds),
                f"{label} x": _times(None if row is None else row.time_ratio),
                f"{label} peak": "-" if row is None or row.peak is None else bytes_text(row.peak),
            }
        forward = directions["forward"]
        line["GFLOP/s"] = f"{forward.flops_per_second / 1e9:.1f}"
        line["of matmul"] = f"{100 * forward.matmul_share:.1f} %"
        yield line


def slopes(rows: Sequence[Row]) -> dict[str, float]:
    """Return "pattern, case, direction" -> log-log slope of time over tokens, for our cases on several grids."""
    points: dict[str, list[Row]] = {}
    for row in rows:
        if row.against is None and row.pattern != STATISTICS:
            points.setdefault(f"{row.pattern}, {row.case}, {row.direction}", []).append(row)
    return {name: _slope(series) for name, series in points.items() if len({row.tokens for row in series}) > 1}


def _slope(series: Sequence[Row]) -> float:
    return statistics.linear_regression([log(row.tokens) for row in series], [log(row.seconds) for row in series]).slope


def _row(
    setting: Setting,
    case: Case,
    direction: Direction,
    rounds: Mapping[str, Sequence[float]],
    peak: Mapping[str, int],
    matmul: float,
    difference: float | None,
) -> Row:
    seconds = {name: statistics.median(times) for name, times in rounds.items()}
    products = 2 if direction == "forward" else 6
    pairs = setting.tokens**2 if setting.pattern == STATISTICS else allowed_pairs(pattern_of(setting))
    rate = products * 2 * pairs * setting.heads * setting.head_dim / seconds[case.name]
    return Row(
        pattern=setting.pattern,
        grid=setting.grid,
        tokens=setting.tokens,
        case=case.name,
        against=case.against,
        direction=direction,
        seconds=seconds[case.name],
        fastest=min(rounds[case.name]),
        time_ratio=_over(case, seconds),
        peak=peak.get(case.name),
        memory_ratio=_over(case, peak),
        flops_per_second=rate,
        matmul_share=rate / matmul,
        difference=difference,
    )


def _first_runs(cases: Sequence[Case]) -> tuple[dict[str, float], dict[str, str]]:
    """Make every case's first, slow run; return how far the peers' outputs are from ours, and which peers failed.

    A peer may lack what it needs on this machine, such as a compiler; that is its figure. Ours must run.
    """
    outputs, failed = {}, {}
    for case in cases:
        try:
            with torch.no_grad():
                outputs[case.name] = case.heads_first(case.call(*case.inputs)).float().cpu()
        except RuntimeError as error:
            if case.against is None:
                raise
            failed[case.name] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    pairs = {
        case.name: (outputs[case.name], outputs[case.against])
        for case in cases
        if case.against in outputs and case.name in outputs
    }
    return {name: (theirs - ours).abs().max().item() for name, (theirs, ours) in pairs.items()}, failed


def _over(case: Case, figures: Mapping[str, float]) -> float | None:
    """Return a case's figure over that of the case it is compared with; None where one is missing or 0."""
    if case.against is None or case.name not in figures:
        return None
    other = figures.get(case.against)
    return figures[case.name] / other if other else None


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
