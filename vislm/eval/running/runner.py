"""Running a benchmark: generate what is missing, append it, score what is there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from vislm.errors import AnnotationError, ImageError, UnknownName, UsageError
from vislm.eval.protocol import Asked, Benchmark, Rows, Sample, Subject
from vislm.eval.running.pictures import batches
from vislm.eval.running.processes import World
from vislm.eval.running.progress import progress_bar
from vislm.eval.running.store import ROWS, collect, open_folder, open_rows, part_name, read_rows, write_results
from vislm.eval.running.subjects import AnswersQuestions, as_subject
from vislm.eval.uncertainty import standard_error

_PACKAGES = ("vislm", "torch", "transformers", "pillow")
_LISTED = 5
"""Faults that a message names."""


@dataclass(frozen=True)
class Options:
    """How a benchmark is run; nothing here changes a score."""

    batch_size: int = 32
    limit: int | None = None
    on_error: Literal["stop", "skip"] | str = "stop"
    workers: int = 2
    progress: bool = False

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "skip"):
            raise UnknownName("on_error", self.on_error, ("stop", "skip"))
        for name, value, least in (("batch_size", self.batch_size, 1), ("workers", self.workers, 0)):
            if value < least:
                raise UsageError(f"{name}={value}: expected a whole number >= {least}")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit={self.limit}: expected a whole number >= 1, or None for all samples")


def run(
    benchmark: Benchmark,
    model: AnswersQuestions | Subject,
    out: str | Path,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    on_error: Literal["stop", "skip"] | str = "stop",
    workers: int = 2,
    progress: bool = False,
    world: World | None = None,
) -> dict[str, Any]:
    """Run a benchmark into a folder, or finish a run that was killed there; return the results.

    The folder gets run.json (the fingerprint), predictions.jsonl (one line per sample, appended at once) and
    results.json. The results do not depend on batch size, workers or number of processes.

    Args:
        benchmark: from ``load_benchmark``.
        model: an LMM with the interventions in force, or another subject.
        out: the run folder.
        batch_size: samples per call of the model.
        limit: only the first samples.
        on_error: what a broken picture or row does: "stop", or "skip", which lists it in the results.
        workers: threads that decode pictures ahead of the model; 0: none.
        progress: show a progress bar on a terminal.
        world: the processes that share the work; None: this one alone.

    Raises:
        ImageError: a broken picture, with "stop".
        AnnotationError: broken rows of the annotations, with "stop", or ids that are not unique.
        RunFolderError: the folder belongs to another run or another process, or cannot be written.
    """
    options = Options(batch_size, limit, on_error, workers, progress)
    subject, world, folder = as_subject(model), world or World(), Path(out)
    _check_rows(benchmark, options.on_error)
    fingerprint = fingerprint_of(benchmark, subject)
    samples = list(benchmark.samples)[:limit]
    began, started = datetime.now(timezone.utc), time.perf_counter()
    with contextlib.ExitStack() as stack:
        done = set(world.first(lambda: list(stack.enter_context(open_folder(folder, fingerprint)))))
        todo = world.share([s for s in samples if s.id not in done])
        rows_name = ROWS if world.size == 1 else part_name(world.rank)
        broken = [] if not todo else _generate(benchmark, subject, todo, folder / rows_name, options, world, len(done))
        every = [fault for part in world.gather(broken) for fault in part]

        def finish() -> dict[str, Any]:
            order = [s.id for s in benchmark.samples]
            found = collect(folder, order)
            rows = {s.id: found[s.id] for s in samples if s.id in found}
            place = {i: number for number, i in enumerate(order)}
            results = {
                **summary(benchmark, rows),
                "n_missing": len(samples) - len(rows),
                "broken": sorted(every, key=lambda fault: place[fault["id"]]) + _left_out(benchmark),
                "config": fingerprint,
                "versions": {name: v for name in _PACKAGES if (v := _version(name))},
                **cost_of(rows),
                "processes": world.size,
                "batch_size": batch_size,
                "started": began.isoformat(timespec="seconds"),
                "seconds": time.perf_counter() - started,
            }
            write_results(folder, results)
            return results

        return world.first(finish)


def rescore(benchmark: Benchmark, predictions: str | Path, *, allow_partial: bool = False) -> dict[str, Any]:
    """Score a predictions file again, without the model; rows and samples are joined by id.

    Args:
        benchmark: from ``load_benchmark``, with the same options as the run.
        predictions: predictions.jsonl of a run folder, or any JSON lines with "id", "text" and perhaps "candidates".
        allow_partial: score what is there instead of refusing a file that lacks samples.

    Raises:
        AnnotationError: samples without a row (unless allowed) or rows without a sample, with the first ids.
        RunFolderError: the file is damaged.
    """
    stored = read_rows(Path(predictions))
    wanted = [s.id for s in benchmark.samples]
    missing = [i for i in wanted if i not in stored]
    extra = sorted(stored.keys() - set(wanted))
    if extra or (missing and not allow_partial):
        raise AnnotationError(
            f"{predictions} does not fit {benchmark.name}: {len(missing)} samples without a row {missing[:_LISTED]}, "
            f"{len(extra)} rows without a sample {extra[:_LISTED]}"
        )
    rows = {i: stored[i] for i in wanted if i in stored}
    config = {f"protocol.{k}": v for k, v in benchmark.protocol.items()}
    return {**summary(benchmark, rows), "n_missing": len(missing), "config": config}


def summary(benchmark: Benchmark, rows: Rows) -> dict[str, Any]:
    """Return what follows from the rows alone: metrics, standard error of the score, figures per group, counts."""
    cluster = {s.id: s.cluster for s in benchmark.samples}
    verdicts = {i: benchmark.parse(row) for i, row in rows.items()}
    scored = {i: v.score for i, v in verdicts.items() if v.score is not None}
    error = standard_error(list(scored.values()), [cluster[i] for i in scored]) if len(scored) > 1 else None
    return {
        "benchmark": benchmark.name,
        "metrics": benchmark.aggregate(rows),
        "score": {"mean": sum(scored.values()) / max(1, len(scored)), "standard_error": error, "n": len(scored)},
        "per_group": benchmark.groups(rows),
        "n": len(rows),
        "n_unparsed": sum(v.answer is None for v in verdicts.values()),
        "figures": [vars(figure) for figure in benchmark.figures],
    }


def fingerprint_of(benchmark: Benchmark, subject: Subject) -> dict[str, Any]:
    """Return what determines the rows: model and methods, protocol, samples with prompts, control, package version."""
    digest = hashlib.sha256()
    for s in benchmark.samples:
        described = [s.id, s.image_names, s.prompt, s.truth, s.candidates, s.choices, s.group]
        digest.update(json.dumps(described, sort_keys=True).encode())
    return {
        **subject.fingerprint(),
        "benchmark": benchmark.name,
        **{f"protocol.{k}": v for k, v in benchmark.protocol.items()},
        "samples": digest.hexdigest()[:16],
        "control": benchmark.control,
        "max_new_tokens": benchmark.max_new_tokens,
        "vislm": _version("vislm"),
    }


def cost_of(rows: Rows) -> dict[str, float]:
    """Return what an average sample took: visual tokens before and after, FLOPs, milliseconds (median of samples)."""

    def values(key: str) -> list[float]:
        return [row[key] for row in rows.values() if isinstance(row.get(key), (int, float))]

    means = {key: statistics.fmean(v) for key in ("visual_tokens", "visual_tokens_kept", "flops") if (v := values(key))}
    seconds = values("seconds")
    if seconds:
        means["milliseconds"] = 1e3 * statistics.median(seconds)
        means["model_seconds"] = sum(seconds)
    return means


def _generate(
    benchmark: Benchmark,
    subject: Subject,
    todo: Sequence[Sample],
    path: Path,
    options: Options,
    world: World,
    done: int,
) -> list[dict[str, str]]:
    """Append a row for each sample to a file and return the samples that could not be asked."""
    broken: list[dict[str, str]] = []

    def note(sample: Sample, error: ImageError) -> None:
        if options.on_error == "stop":
            raise error
        broken.append({"id": sample.id, "error": str(error)})

    name = benchmark.name if world.size == 1 else f"{benchmark.name}, process {world.rank + 1} of {world.size}"
    before = done if world.size == 1 else 0
    wanted, left = options.progress and world.is_first, len(todo)
    with open_rows(path) as file, progress_bar(name, before + len(todo), before, wanted) as advance:
        for batch in batches(todo, options.batch_size, options.workers, benchmark.control, note):
            if batch:
                answers = subject.respond(batch, max_new_tokens=benchmark.max_new_tokens)
                file.add(_row(benchmark, asked, answer) for asked, answer in zip(batch, answers, strict=True))
            advance(min(options.batch_size, left))
            left -= options.batch_size
    return broken


def _row(benchmark: Benchmark, asked: Asked, answer: Mapping[str, Any]) -> dict[str, Any]:
    sample = asked.sample
    row = {"id": sample.id, "images": sample.image_names, "group": sample.cluster, "prompt": sample.prompt, **answer}
    verdict = benchmark.parse(row)
    row = {**row, "truth": sample.truth, "answer": verdict.answer, "score": verdict.score}
    if verdict.values:
        row["values"] = dict(verdict.values)
    if verdict.parts:
        row["parts"] = list(verdict.parts)
    return row


def _check_rows(benchmark: Benchmark, on_error: str) -> None:
    ids: set[str] = set()
    for sample in benchmark.samples:
        if sample.id in ids:
            raise AnnotationError(f"{benchmark.name}: sample id {sample.id!r} appears twice")
        ids.add(sample.id)
    if benchmark.faults and on_error == "stop":
        raise AnnotationError(
            f"{benchmark.name}: {len(benchmark.faults)} broken rows: {'; '.join(benchmark.faults[:_LISTED])}; mend "
            "them or use --on-error skip"
        )


def _left_out(benchmark: Benchmark) -> list[dict[str, str]]:
    return [{"id": "", "error": fault} for fault in benchmark.faults]


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
