"""``vislm bench kernels``: local attention of ours beside its peers, all in one process, taking turns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vislm.bench.kernels.cases import GIB, PATTERNS, PEERS, Setting, pattern_of
from vislm.bench.kernels.plot import plot_rows
from vislm.bench.kernels.rows import Measured, measure, slopes, table_rows
from vislm.bench.kernels.statistics import EAGER, SDPA, statistics_setting
from vislm.errors import UnknownName, UsageError
from vislm.files import atomic_write
from vislm.report.tables import text_table
from vislm.report.units import bytes_text, milliseconds_text

GRIDS = ((28, 28), (56, 56), (112, 112), (224, 224))


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        grids: grids of tokens; times of ours over them give the log-log slope.
        window: keys along each axis of a window, and the side of a block for ``"halo"``.
        heads: query and key heads.
        head_dim: channels of a head.
        runs: interleaved rounds at most.
        patterns: some of ``"neighborhood"``, ``"halo"``, ``"window"``.
        peers: some of ``"sdpa"``, ``"flex"``, ``"gather"``, ``"eager"``, ``"natten"``, ``"timm"``.
        memory_limit: GiB; a peer whose N x N or gathered tensors need more is skipped.
        budget: seconds per grid and direction after which no further round starts.
        device: where to run.
        dtype: name of a torch dtype.
        memory: measure peaks too, each setting in a fresh process.
        statistics_tokens: length of the sequence whose statistics are measured; 0 = none.
    """

    grids: Sequence[tuple[int, ...]] = GRIDS
    window: int = 7
    heads: int = 3
    head_dim: int = 32
    runs: int = 15
    patterns: Sequence[str] = PATTERNS
    peers: Sequence[str] = PEERS
    memory_limit: float = 8.0
    budget: float = 30.0
    device: str = "cpu"
    dtype: str = "float32"
    memory: bool = True
    statistics_tokens: int = 2880

    def quick(self) -> Bench:
        """Return the benchmark in small: two grids of at most 28 x 28, three rounds; only to see that it runs."""
        return dataclasses.replace(self, grids=((14, 14), (28, 28)), runs=3, budget=5.0, statistics_tokens=288)

    def settings(self) -> list[Setting]:
        """Return the settings in order, pattern by pattern.

        Raises:
            UnknownName: an unknown pattern, peer or dtype.
            UsageError: a window that does not fit a grid, no grids, or no such device.
        """
        for kind, given, valid in (("pattern", self.patterns, PATTERNS), ("peer", self.peers, PEERS)):
            for name in given:
                if name not in valid:
                    raise UnknownName(kind, name, valid)
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise UnknownName("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        if not self.grids or not self.patterns:
            raise UsageError("nothing to measure: give at least one grid and one pattern")
        base = Setting(
            self.patterns[0], tuple(self.grids[0]), self.window, self.heads, self.head_dim,
            int(self.memory_limit * GIB), torch.get_num_threads(), self.device, self.dtype, tuple(self.peers),
        )  # fmt: skip
        found = [
            dataclasses.replace(base, pattern=pattern, grid=tuple(grid))
            for pattern in self.patterns
            for grid in self.grids
        ]
        for setting in found:
            pattern_of(setting)
        return found


def kernel_lines(bench: Bench, out: Path) -> Iterator[str]:
    """Yield tables while they are measured; write ``kernels.json`` and one plot per pattern into the folder ``out``.

    Raises:
        UnknownName: see :meth:`Bench.settings`.
        UsageError: see :meth:`Bench.settings`.
    """
    settings = bench.settings()
    yield f"{machine()}; {bench.dtype}, {bench.heads} heads x {bench.head_dim}, window {bench.window}, batch 1"
    yield "times: medians of rounds in which all cases take turns; x: over the first case of ours; peak: beyond q, k, v"
    results: list[Measured] = []
    for setting in settings:
        results.append(measure(setting, bench.runs, bench.budget, bench.memory))
        _write_json(bench, results, {}, out / "kernels.json")  # what is measured survives a kill
        yield from _setting_lines(results[-1])
    rows = [row for measured in results for row in measured.rows]
    fitted = slopes(rows)
    if fitted:
        yield "\nlog-log slope of time over tokens (1 = linear)"
        yield from (f"  {name}: {slope:.2f}" for name, slope in fitted.items())
    if bench.statistics_tokens:
        wanted = statistics_setting(settings[0], bench.statistics_tokens)
        results.append(measure(wanted, bench.runs, bench.budget, bench.memory))
        yield from _statistics_lines(results[-1])
    written = [_write_json(bench, results, fitted, out / "kernels.json")]
    for pattern in dict.fromkeys(setting.pattern for setting in settings):
        written.append(plot_rows([row for row in rows if row.pattern == pattern], out / f"kernels_{pattern}.png"))
    yield f"\nwritten: {', '.join(map(str, written))}"


def machine() -> str:
    """Return what the figures were taken on, in one line."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux tells more
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _setting_lines(measured: Measured) -> Iterator[str]:
    setting = measured.setting
    grid = "x".join(map(str, setting.grid))
    yield f"\n{setting.pattern}, {grid} = {setting.tokens} tokens; matmul {measured.matmul / 1e9:.0f} GFLOP/s"
    yield text_table(list(table_rows(measured)))
    differences = {row.case: row.difference for row in measured.rows if row.difference is not None}
    if differences:
        worst = max(differences, key=lambda name: differences[name])
        yield f"outputs agree within {differences[worst]:.1e} ({worst})"
    yield from (f"skipped: {skip.name}: {skip.reason}" for skip in measured.skipped)


def _statistics_lines(measured: Measured) -> Iterator[str]:
    setting, rows = measured.setting, {row.case: row for row in measured.rows}
    eager = rows[EAGER].peak
    yield f"\nstatistics, {setting.tokens} tokens, {setting.heads} heads x {setting.head_dim}"
    yield text_table(
        [
            {
                "case": row.case,
                "forward": milliseconds_text(row.seconds),
                "/ SDPA": f"{row.seconds / rows[SDPA].seconds:.2f}",
                "peak": "-" if row.peak is None else bytes_text(row.peak),
                "of eager's": "-" if row.peak is None or not eager else f"{100 * row.peak / eager:.1f} %",
            }
            for row in rows.values()
        ]
    )


def _write_json(bench: Bench, results: Sequence[Measured], fitted: dict[str, float], out: Path) -> Path:
    content = {
        "machine": machine(),
        "bench": asdict(bench),
        "rows": [asdict(row) for measured in results for row in measured.rows],
        "skipped": [
            {"pattern": measured.setting.pattern, "grid": measured.setting.grid, **asdict(skip)}
            for measured in results
            for skip in measured.skipped
        ],
        "slopes": fitted,
    }
    with atomic_write(out) as handle:
        json.dump(content, handle, indent=1)
    return out
