"""Running a benchmark: generate what is missing, append it, score what is there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from vislm.errors import AnnotationError, ImageError, UnknownName, UsageError
from vislm.eval.benchmarks import Benchmark, Sample, picture
from vislm.eval.store import open_store, read_rows


class AnswersQuestions(Protocol):
    """What the runner needs of a model; ``vislm.LMM`` is one."""

    def ask_many(
        self, images: Sequence[Any], questions: Sequence[str], *, max_new_tokens: int, candidates: Sequence[str]
    ) -> Sequence[Any]:
        """Return one answer with text, candidates, visual_tokens, visual_tokens_kept and seconds per question."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines the answers: weights, interventions, decoding."""
        ...


def run(
    benchmark: Benchmark,
    lmm: AnswersQuestions,
    out: str | Path,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    on_error: Literal["stop", "skip"] | str = "stop",
    progress: bool = False,
) -> dict[str, Any]:
    """Run a benchmark into a folder, or finish a run that was killed there; return the results.

    The folder gets run.json (the fingerprint), predictions.jsonl (one line per sample, appended at once) and
    results.json. The results do not depend on the batch size.

    Args:
        benchmark: from ``load_benchmark``.
        lmm: the model, with the interventions in force.
        out: the run folder.
        batch_size: samples per call of the model.
        limit: only the first samples.
        on_error: what a broken picture does: "stop", or "skip", which lists it in the results.
        progress: show a progress bar on a terminal.

    Raises:
        ImageError: a broken picture, with "stop".
        RunFolderError: the folder belongs to another run or another process.
    """
    if on_error not in ("stop", "skip"):
        raise UnknownName("on_error", on_error, ("stop", "skip"))
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: expected a whole number >= 1")
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit}: expected a whole number >= 1, or None for all samples")
    versions = {name: version(name) for name in ("vislm", "torch", "transformers", "pillow")}
    fingerprint = {
        **lmm.fingerprint(),
        "benchmark": benchmark.name,
        **{f"protocol.{k}": v for k, v in benchmark.protocol.items()},
        "max_new_tokens": benchmark.max_new_tokens,
        "vislm": versions["vislm"],
    }
    samples = list(benchmark.samples)[:limit]
    began, started = datetime.now(timezone.utc), time.perf_counter()
    broken: list[dict[str, str]] = []
    with open_store(Path(out), fingerprint) as store:
        todo = [s for s in samples if s.id not in store.rows]
        with _bar(len(samples), len(samples) - len(todo), benchmark.name, progress) as advance:
            for start in range(0, len(todo), batch_size):
                batch = _open(todo[start : start + batch_size], benchmark, on_error, broken)
                if batch:
                    store.add(_rows(benchmark, lmm, batch))
                advance(len(todo[start : start + batch_size]))
        wanted = {s.id for s in samples}
        rows = {i: store.rows[i] for i in (s.id for s in samples) if i in store.rows}
        results = {
            "benchmark": benchmark.name,
            "metrics": benchmark.score(rows),
            "per_group": benchmark.groups(rows),
            "n": len(rows),
            "n_missing": len(wanted) - len(rows),
            "broken_images": broken,
            "config": fingerprint,
            "versions": versions,
            "started": began.isoformat(timespec="seconds"),
            "visual_tokens": _mean(rows, "visual_tokens"),
            "visual_tokens_kept": _mean(rows, "visual_tokens_kept"),
            "model_seconds": sum(r["seconds"] for r in rows.values()),
            "seconds": time.perf_counter() - started,
        }
        store.finish(results)
    return results


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
            f"{predictions} does not fit {benchmark.name}: {len(missing)} samples without a row {missing[:5]}, "
            f"{len(extra)} rows without a sample {extra[:5]}"
        )
    rows = {i: stored[i] for i in wanted if i in stored}
    return {
        "benchmark": benchmark.name,
        "metrics": benchmark.score(rows),
        "per_group": benchmark.groups(rows),
        "n": len(rows),
        "n_missing": len(missing),
        "config": {f"protocol.{k}": v for k, v in benchmark.protocol.items()},
    }


def _open(
    samples: Sequence[Sample], benchmark: Benchmark, on_error: str, broken: list[dict[str, str]]
) -> list[tuple[Sample, Image.Image]]:
    opened = []
    for sample in samples:
        try:
            opened.append((sample, picture(sample, benchmark.control)))
        except ImageError as error:
            if on_error == "stop":
                raise
            broken.append({"id": sample.id, "error": str(error)})
    return opened


def _rows(benchmark: Benchmark, lmm: AnswersQuestions, batch: list[tuple[Sample, Image.Image]]) -> list[dict[str, Any]]:
    answers = lmm.ask_many(
        [image for _, image in batch],
        [sample.prompt for sample, _ in batch],
        max_new_tokens=benchmark.max_new_tokens,
        candidates=benchmark.candidates,
    )
    return [
        {
            "id": sample.id,
            "image": sample.image.name,
            "prompt": sample.prompt,
            "text": answer.text,
            "candidates": answer.candidates,
            "visual_tokens": answer.visual_tokens,
            "visual_tokens_kept": answer.visual_tokens_kept,
            "seconds": answer.seconds,
        }
        for (sample, _), answer in zip(batch, answers, strict=True)
    ]


def _mean(rows: dict[str, dict[str, Any]], key: str) -> float:
    return sum(r[key] for r in rows.values()) / max(1, len(rows))


@contextlib.contextmanager
def _bar(total: int, done: int, name: str, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, silence elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not (wanted and console.is_terminal), transient=True) as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda n: bar.update(task, advance=n)
