"""``vislm bench backbones``: measure pair by pair, print tables and verdicts, write JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vislm.bench.backbones.blocks import BlockRow, block_table_row, measure_blocks
from vislm.bench.backbones.memory import peak_memory
from vislm.bench.backbones.models import PEERS, Model, Pair, pairs_of
from vislm.bench.backbones.rows import Row, measure, table_row
from vislm.bench.backbones.verdicts import Verdict, growths, verdicts
from vislm.bench.kernels.run import machine
from vislm.errors import UsageError
from vislm.files import atomic_write
from vislm.report.tables import text_table

SIZES = (224, 448, 896)


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        models: names such as ``nat_tiny``, or with a peer of one's own, ``nat_tiny:resnet50``.
        sizes: pixels along a side; the two largest give the growth.
        batch: images at once at 224 pixels, for the throughput; larger images come in smaller batches.
        threads: of the process.
        repeats: rounds at most; the fastest counts.
        budget: seconds per group of models and size after which no further round starts.
        training: forward and backward, and not inference.
        memory: measure peaks too, each model in a fresh process.
        blocks: compare single blocks of neighborhood attention and Swin too.
    """

    models: Sequence[str] = tuple(PEERS)
    sizes: Sequence[int] = SIZES
    batch: int = 4
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)
    repeats: int = 4
    budget: float = 10.0
    training: bool = False
    memory: bool = True
    blocks: bool = True

    def groups(self) -> list[list[Pair]]:
        """Return the pairs, those with the same peer together.

        Raises:
            UnknownName: a backbone or a peer that does not exist.
            UsageError: nothing to measure, or numbers below 1.
        """
        if not self.sizes or min(*self.sizes, self.batch, self.threads, self.repeats) < 1:
            raise UsageError(
                f"sizes={list(self.sizes)}, batch={self.batch}, threads={self.threads}, repeats={self.repeats}; "
                "expected at least one size, and numbers of 1 or more"
            )
        groups: dict[Model, list[Pair]] = {}
        for pair in dict.fromkeys(pairs_of(self.models)):
            groups.setdefault(pair.peer, []).append(pair)
        return list(groups.values())


def backbone_lines(bench: Bench, out: Path | None = None) -> Iterator[str]:
    """Yield tables while they are measured; write all figures to the JSON file ``out``, after each step.

    Raises:
        UnknownName: see :meth:`Bench.groups`.
        UsageError: see :meth:`Bench.groups`.
    """
    groups = bench.groups()
    with _threads(bench.threads):
        direction = "forward + backward" if bench.training else "inference"
        yield f"{machine()}; float32, {direction}, the fastest of {bench.repeats} rounds in which all take turns"
        yield "x: ours over timm's; peak: beside weights and image, of one image, in a process of its own"
        rows, blocks, peaks = list[Row](), list[BlockRow](), dict[Model, dict[int, int]]()
        for pairs in groups:
            measured = [
                row
                for size in sorted(set(bench.sizes))
                for row in measure(pairs, size, bench.batch, bench.repeats, bench.budget, bench.training)
            ]
            if bench.memory:
                measured = list(_with_peaks(measured, bench, peaks))
            rows += sorted(measured, key=lambda row: row.pair.ours.name)
            _write(out, bench, rows, blocks)
            yield "\n" + text_table([table_row(row) for row in rows if row.pair in pairs])
        yield from _growth_lines(rows)
        if bench.blocks:
            blocks += measure_blocks(1, bench.repeats * 4, bench.budget / 4)
            blocks += measure_blocks(bench.batch, bench.repeats * 2, bench.budget / 4)
            yield "\ntwo neighborhood attention blocks beside timm's plain and shifted Swin block, window 7"
            yield text_table([block_table_row(row) for row in blocks])
        found = verdicts(rows, blocks)
        if found:
            yield "\n" + text_table([_verdict_row(verdict) for verdict in found])
        _write(out, bench, rows, blocks)
        if out is not None:
            yield f"\nwritten: {out}"


def _with_peaks(rows: Sequence[Row], bench: Bench, known: dict[Model, dict[int, int]]) -> Iterator[Row]:
    sizes = [row.size for row in rows]
    for row in rows:
        for model in (row.pair.ours, row.pair.peer):
            if not set(sizes) <= set(known.get(model, ())):
                known[model] = peak_memory(model, sizes, bench.training, bench.threads) or dict.fromkeys(sizes, 0)
        ours, peer = known[row.pair.ours][row.size] or None, known[row.pair.peer][row.size] or None
        yield dataclasses.replace(
            row, ours=dataclasses.replace(row.ours, peak=ours), peer=dataclasses.replace(row.peer, peak=peer)
        )


def _growth_lines(rows: Sequence[Row]) -> Iterator[str]:
    found = growths(rows)
    if found:
        yield "\nexponent of time over pixels between the two largest sizes (1 = linear)"
        yield text_table([{"model": key, "exponent": f"{slope:.2f}"} for key, slope in found.items()])


def _verdict_row(verdict: Verdict) -> dict[str, str]:
    answer = "yes" if verdict.holds else "NO"
    return {"claim": verdict.claim, "about": verdict.about, "holds": answer, "figures": verdict.figures}


def _write(out: Path | None, bench: Bench, rows: Sequence[Row], blocks: Sequence[BlockRow]) -> None:
    if out is None:
        return
    content = {
        "machine": machine(),
        "bench": asdict(bench),
        "rows": [
            asdict(row)
            | {"time_ratio": row.time_ratio, "throughput_ratio": row.throughput_ratio, "memory_ratio": row.memory_ratio}
            for row in rows
        ],
        "growth": growths(rows),
        "blocks": [asdict(row) | {"ratio": row.ratio} for row in blocks],
        "verdicts": [asdict(verdict) for verdict in verdicts(rows, blocks)],
    }
    with atomic_write(out) as handle:
        json.dump(content, handle, indent=1)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
