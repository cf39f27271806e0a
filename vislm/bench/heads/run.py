"""``vislm bench heads``: methods and the untouched model in turn, a table, verdicts, JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vislm.bench.heads.cases import CASES, case
from vislm.bench.heads.measure import groups_of, measure
from vislm.bench.heads.rows import STEP_LIMITS, TEXT_ONLY_LIMITS, Row, step_seconds
from vislm.bench.kernels.run import machine
from vislm.bench.pruning.model import ONE_CROP, SHAPE, TEXT_TOKENS, Subject, build
from vislm.errors import UsageError
from vislm.files import atomic_write
from vislm.lmm.cost.flops import DecoderShape
from vislm.report.tables import text_table


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        tokens: visual tokens: 729 for one crop, more for a picture in tiles.
        methods: of ``cases.CASES``.
        rounds: timed ones at most; a first one, for memory and warming up, is not timed.
        steps: decode steps of every answer.
        budget: seconds for each dtype after which no further round starts.
        dtypes: some of "float32", "bfloat16", "float16".
        device: "cpu", "cuda", ...
        threads: of the process.
        tower_layers: None: all 26.
        layers: decoder layers; None: all 24.
        sizes: further changes to the shape (see ``bench.pruning.model.build``), for tests.
    """

    tokens: int = ONE_CROP
    methods: Sequence[str] = tuple(CASES)
    rounds: int = 3
    steps: int = 24
    budget: float = 300.0
    dtypes: Sequence[str] = ("bfloat16", "float32")
    device: str = "cpu"
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)
    tower_layers: int | None = None
    layers: int | None = None
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Raise ``UsageError`` (``UnknownName``) for methods and numbers that cannot be measured."""
        if not self.methods or not self.dtypes or min(self.rounds, self.steps, self.threads) < 1:
            raise UsageError(
                f"methods={list(self.methods)}, dtypes={list(self.dtypes)}, rounds={self.rounds}, steps={self.steps}, "
                f"threads={self.threads}: expected at least one of each"
            )
        for dtype in self.dtypes:
            if dtype not in ("float32", "bfloat16", "float16"):
                raise UsageError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
        for name in self.methods:
            case(name)


def head_lines(bench: Bench, out: Path | None = None) -> Iterator[str]:
    """Yield the description, a table of methods and verdicts for each dtype; write all figures to ``out`` as JSON.

    Raises:
        UsageError: see :meth:`Bench.check`.
    """
    bench.check()
    began, found = time.perf_counter(), {}
    with _threads(bench.threads):
        for dtype in bench.dtypes:
            subject = build(
                bench.tokens, getattr(torch, dtype), bench.device, bench.tower_layers, bench.layers, **bench.sizes
            )
            yield from _description(bench, dtype, subject)
            groups = groups_of({name: case(name) for name in bench.methods})
            measure(subject, groups, bench.rounds, bench.steps, time.perf_counter() + bench.budget)
            plain = [m for group in groups if not group.options for m in group.untouched]
            if plain:
                yield (
                    f"untouched, greedy: prefill {median(m.prefill for m in plain) * 1e3:.0f} ms, decode step "
                    f"{median(map(step_seconds, plain)) * 1e3:.1f} ms; a prefill of the text alone "
                    f"{median(t for group in groups for t in group.text_only) * 1e3:.0f} ms"
                )
            made = {row.method: row for row in (Row.of(name, group) for group in groups for name in group.cases)}
            rows = found[dtype] = [made[name] for name in bench.methods]
            yield text_table([row.cells() for row in rows])
            yield from _verdicts(rows)
            del subject
    if out is not None:
        content = {
            "bench": asdict(bench),
            "machine": machine(),
            "rows": {dtype: [asdict(row) for row in rows] for dtype, rows in found.items()},
        }
        with atomic_write(out, "w") as handle:
            json.dump(content, handle, indent=1)
        yield f"written to {out}"
    yield f"took {time.perf_counter() - began:.0f} s"


def _description(bench: Bench, dtype: str, subject: Subject) -> Iterator[str]:
    adapter = subject.adapter
    tower, decoder = adapter.tower_shape, DecoderShape.of(adapter.text_config)
    yield (
        f"{machine()}; {dtype}, {bench.threads} threads; medians of up to {bench.rounds} rounds with {bench.steps} "
        "decode steps each, all taking turns"
    )
    reduced = " (fewer than the true 26)" if bench.tower_layers is not None else ""
    yield (
        f"random weights in the shape of {SHAPE}: tower {tower.layers} layers{reduced} x {tower.width}, decoder "
        f"{decoder.layers} layers x {decoder.width}, {decoder.heads} heads, {decoder.kv_heads} for keys and values, "
        f"MLP {decoder.mlp_width}, {decoder.vocabulary} words; prompt: {subject.visual_tokens} visual tokens, "
        f"{TEXT_TOKENS} of text"
    )
    yield (
        "prefill: until the first token, without the tower's first run (drafts and further runs of the model count); "
        "step: one decode step; both over the untouched model in the same round"
    )


def _verdicts(rows: Sequence[Row]) -> Iterator[str]:
    judged = [(row, misses) for row in rows if (misses := row.misses()) is not None]
    if not judged:
        return
    limits = ", ".join(f"{name} <= {limit:.2f}" for name, limit in STEP_LIMITS.items())
    added = ", ".join(f"{name} <= {limit:.0f} prefill of the text" for name, limit in TEXT_ONLY_LIMITS.items())
    good = sum(not misses for _, misses in judged)
    yield f"{good} of {len(judged)} are within all limits (a decode step: {limits}; added to the prefill: {added})"
    for row, misses in judged:
        if misses:
            yield f"  missed: {row.method}: {', '.join(misses)}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
