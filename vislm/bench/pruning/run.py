"""``vislm bench pruning``: methods and the untouched model in turn, a table, JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vislm.bench.kernels.run import machine
from vislm.bench.pruning.cases import KEEPS, SPECS, method_at
from vislm.bench.pruning.field import map_bytes
from vislm.bench.pruning.measure import Field, bare_ratio, measure, measure_field, plain_prompts
from vislm.bench.pruning.model import ONE_CROP, SHAPE, TEXT_TOKENS, Subject, build
from vislm.bench.pruning.rows import TARGETS, Row
from vislm.demo.true_shape import fast_dtype
from vislm.errors import UsageError
from vislm.files import atomic_write
from vislm.lmm.choosing.tokens import token_count
from vislm.lmm.cost.flops import DecoderShape
from vislm.report.tables import text_table
from vislm.report.units import bytes_text

_MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        tokens: visual tokens: 729 for one crop, more for a picture in tiles.
        methods: of ``cases.SPECS``.
        keeps: ratios of the visual tokens.
        rounds: timed ones at most; a first one, for memory and warming up, is not timed.
        budget: seconds after which no further round starts.
        dtype: "float32", "bfloat16", or "auto": the one that the machine multiplies faster.
        device: "cpu", "cuda", ...
        threads: of the process.
        tower_layers: None: all 26.
        layers: decoder layers; None: all 24.
        field: also measure eager attention that returns its maps.
        sizes: further changes to the shape (see ``model.build``), for tests.
    """

    tokens: int = ONE_CROP
    methods: Sequence[str] = tuple(SPECS)
    keeps: Sequence[float] = KEEPS
    rounds: int = 4
    budget: float = 360.0
    dtype: str = "auto"
    device: str = "cpu"
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)
    tower_layers: int | None = None
    layers: int | None = None
    field: bool = True
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Raise ``UsageError`` (``UnknownName``) for methods and numbers that cannot be measured."""
        if not self.methods or not self.keeps or self.rounds < 1 or self.threads < 1:
            raise UsageError(
                f"methods={list(self.methods)}, keeps={list(self.keeps)}, rounds={self.rounds}, "
                f"threads={self.threads}: expected at least one of each"
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UsageError(f"dtype={self.dtype!r}: expected auto, float32, bfloat16 or float16")
        for name in self.methods:
            for keep in self.keeps:
                method_at(name, keep)

    def subject(self) -> Subject:
        """Return the model and its prompt."""
        dtype = fast_dtype() if self.dtype == "auto" else getattr(torch, self.dtype)
        return build(self.tokens, dtype, self.device, self.tower_layers, self.layers, **self.sizes)


def pruning_lines(bench: Bench, out: Path | None = None) -> Iterator[str]:
    """Yield the description, a table of methods and budgets, and verdicts; write all figures to ``out`` as JSON.

    Raises:
        UsageError: see :meth:`Bench.check`.
    """
    bench.check()
    began = time.perf_counter()
    with _threads(bench.threads):
        subject = bench.subject()
        yield from _description(bench, subject)
        bare = bare_ratio(subject, bench.rounds)
        yield f"a session without methods takes {bare:.3f} of the time of the model alone"
        groups = {name: [(), *((method_at(name, keep),) for keep in bench.keeps)] for name in bench.methods}
        seen = measure(subject, groups, bench.rounds, began + bench.budget)
        plain = plain_prompts(subject, *_plain(subject, bench.keeps), bench.rounds)
        problem = _no_maps(subject) if bench.field else "not asked for"
        field = None if problem else measure_field(subject, bench.keeps, 1)
        rows = [
            Row.of(
                name,
                keep,
                ours,
                runs[0],
                short_prompt=plain.get(_columns(subject, keep)),
                field=None if field is None else field.pruned[keep] / field.sdpa_seconds,
            )
            for name, runs in seen.items()
            for keep, ours in zip(bench.keeps, runs[1:], strict=True)
        ]
        yield text_table([row.cells() for row in rows])
        yield from _verdicts(rows)
        yield from _field_lines(field, rows, problem)
    if out is not None:
        content = {
            "bench": asdict(bench),
            "machine": machine(),
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "visual_tokens": subject.visual_tokens,
            "session_over_bare": bare,
            "rows": [asdict(row) | row.shares() for row in rows],
            "field": None if field is None else asdict(field),
        }
        with atomic_write(out, "w") as handle:
            json.dump(content, handle, indent=1)
        yield f"written to {out}"
    yield f"took {time.perf_counter() - began:.0f} s"


def _description(bench: Bench, subject: Subject) -> Iterator[str]:
    adapter = subject.adapter
    tower, decoder = adapter.tower_shape, DecoderShape.of(adapter.text_config)
    dtype = str(subject.model.dtype).removeprefix("torch.")
    yield f"{machine()}; {dtype}, {bench.threads} threads; the least of up to {bench.rounds} rounds, all taking turns"
    reduced = " (fewer than the true 26)" if bench.tower_layers is not None else ""
    yield (
        f"random weights in the shape of {SHAPE}: tower {tower.layers} layers{reduced} x {tower.width}, decoder "
        f"{decoder.layers} layers x {decoder.width}, {decoder.heads} heads, {decoder.kv_heads} for keys and values, "
        f"MLP {decoder.mlp_width}, {decoder.vocabulary} words"
    )
    yield (
        f"prompt: {subject.visual_tokens} visual tokens of {subject.crops} crop{'s' * (subject.crops > 1)}, "
        f"{TEXT_TOKENS} of text"
    )
    yield (
        "realised: (1 - t/t0) / (1 - FLOPs/FLOPs0) of the prefill; first word: the same with tower, scoring and all "
        "else; plain prompt: what an unpruned prompt with so many fewer words realises; field: FastV with eager "
        "attention that returns its maps"
    )


def _columns(subject: Subject, keep: float) -> int:
    """Return the columns of a prompt with a share of the visual tokens."""
    return TEXT_TOKENS + token_count(keep, subject.visual_tokens)


def _plain(subject: Subject, keeps: Sequence[float]) -> tuple[int, dict[int, float]]:
    """Return the columns of the whole prompt, and those of shorter ones with their share of its FLOPs."""
    decoder = DecoderShape.of(subject.adapter.text_config)
    full = subject.inputs["input_ids"].shape[1]
    whole = decoder.prefill_flops([full] * decoder.layers)
    counts = sorted({_columns(subject, keep) for keep in keeps} - {full})
    return full, {n: decoder.prefill_flops([n] * decoder.layers) / whole for n in counts}


def _no_maps(subject: Subject) -> str | None:
    """Return why the field's way cannot be run; None if it can."""
    needed = 2 * map_bytes(subject, subject.inputs["input_ids"].shape[1])
    free = _free_memory(subject)
    if free is None or needed < free:
        return None
    return f"its maps need about {bytes_text(needed)} with what computes them, and {bytes_text(free)} are free"


def _free_memory(subject: Subject) -> int | None:
    if subject.model.device.type == "cuda":
        return torch.cuda.mem_get_info(subject.model.device)[0]
    if not _MEMORY.exists():
        return None
    lines = _MEMORY.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _verdicts(rows: Sequence[Row]) -> Iterator[str]:
    targets = (
        f"realised in the prefill >= {TARGETS['prefill']:.0%}, until the first word >= {TARGETS['all']:.0%}, scoring "
        f"<= {TARGETS['scoring']:.0%} of the unpruned prefill, key-value bytes as counted"
    )
    missed = [(row, row.misses()) for row in rows]
    good = sum(not found for _, found in missed)
    yield f"{good} of {len(rows)} meet all targets ({targets})"
    for row, found in missed:
        if found:
            yield f"  missed: {row.method} at {row.keep:.0%}: {', '.join(found)}"


def _field_lines(field: Field | None, rows: Sequence[Row], problem: str | None) -> Iterator[str]:
    if field is None:
        yield f"the field's way (eager attention that returns its maps) was not measured: {problem}"
        return
    peak = "" if field.peak is None else f", peak {bytes_text(field.peak)}"
    own = [row.full_peak for row in rows if row.full_peak is not None]
    beside = f" (ours {bytes_text(min(own))})" if own else ""
    yield (
        f"the field's way, untouched: {field.seconds / field.sdpa_seconds:.2f}x the time of SDPA until the first word; "
        f"maps {bytes_text(field.map_bytes)}{peak}{beside}"
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
