"""Is a benchmark's folder complete and sound? What ``vislm data check`` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vislm.errors import AnnotationError, ImageError
from vislm.eval.benchmarks import suspicions
from vislm.eval.protocol import Benchmark, Picture
from vislm.eval.running.pictures import picture
from vislm.eval.specs import name_of, open_benchmark


@dataclass(frozen=True)
class Report:
    """What a folder holds and what is wrong with it."""

    benchmark: str
    samples: int
    pictures: int
    faults: list[str] = field(default_factory=list)
    """What is missing or broken, each with file and line, entry or id; such rows are left out of an evaluation."""
    suspicions: list[str] = field(default_factory=list)
    """What can be evaluated but is not as published."""


def check_folder(benchmark: str, path: str | Path, *, decode: bool = False) -> Report:
    """Read a benchmark's folder and say what is missing or broken.

    Args:
        benchmark: its name, with options if need be: ``textvqa:ocr=true``.
        path: the folder.
        decode: decode every picture instead of only looking whether its file is there.

    Raises:
        UsageError: no such benchmark, option or folder.
    """
    name = name_of(benchmark)
    try:
        task = open_benchmark(benchmark, path)
    except AnnotationError as error:
        return Report(name, 0, 0, [str(error)])
    faults = [*task.faults, *_picture_faults(task, decode)]
    if not task.samples:
        faults.append(f"{path}: nothing to ask is left")
    odd = suspicions(name, task)
    pictures = {source for sample in task.samples for source in sample.images}
    return Report(name, len(task.samples), len(pictures), faults, odd)


def _picture_faults(task: Benchmark, decode: bool) -> Iterator[str]:
    seen: set[Picture] = set()
    for sample in task.samples:
        for source in (s for s in sample.images if s not in seen):
            seen.add(source)
            fault = _picture_fault(source, decode)
            if fault:
                yield f"sample {sample.id}: {fault}"


def _picture_fault(source: Any, decode: bool) -> str | None:
    if isinstance(source, Path) and not source.is_file():
        return f"the picture {source} is missing"
    if decode:
        try:
            picture(source)
        except ImageError as error:
            return str(error)
    return None
