"""Benchmarks by what is written on the command line: ``pope``, ``pope:suffix=short,parser=pai``, ``mmbench:...``."""

from __future__ import annotations

from pathlib import Path

from vislm.errors import UnknownName
from vislm.eval.benchmarks import BENCHMARKS, load_benchmark, read_options
from vislm.eval.protocol import Benchmark, Control


def benchmark_names() -> dict[str, str]:
    """Return every benchmark's name with one line about it."""
    return dict(BENCHMARKS)


def name_of(spec: str) -> str:
    """Return the benchmark's name in ``name:option=value,...``.

    Raises:
        UnknownName: no such benchmark; names the nearest ones.
    """
    name = spec.partition(":")[0].strip()
    if name not in BENCHMARKS:
        raise UnknownName("benchmark", name, BENCHMARKS)
    return name


def open_benchmark(spec: str, folder: str | Path, *, control: Control = "none") -> Benchmark:
    """Read a benchmark's data as ``name:option=value,...`` says.

    Raises:
        UnknownName: no such benchmark or option.
        UsageError: a value of the wrong type.
        AnnotationError: files that are missing or broken.
    """
    name = name_of(spec)
    return load_benchmark(name, folder, control=control, **read_options(name, spec.partition(":")[2]))
