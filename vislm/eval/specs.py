"""Benchmarks by what is written on the command line: ``pope``, ``pope:suffix=short,parser=pai``, ``mmbench:...``."""

from __future__ import annotations

from pathlib import Path

from vislm.errors import UnknownName, UsageError
from vislm.eval import lmm_benchmarks
from vislm.eval.benchmarks import BENCHMARKS, load_benchmark
from vislm.eval.protocol import Benchmark, Control


def benchmark_names() -> dict[str, str]:
    """Return every benchmark's name with one line about it."""
    return dict(sorted({**BENCHMARKS, **lmm_benchmarks.LMM_BENCHMARKS}.items()))


def name_of(spec: str) -> str:
    """Return the benchmark's name in ``name:option=value,...``.

    Raises:
        UnknownName: no such benchmark; names the nearest ones.
    """
    name = spec.partition(":")[0].strip()
    if name not in benchmark_names():
        raise UnknownName("benchmark", name, benchmark_names())
    return name


def open_benchmark(spec: str, folder: str | Path, *, control: Control = "none") -> Benchmark:
    """Read a benchmark's data as ``name:option=value,...`` says.

    Raises:
        UnknownName: no such benchmark or option.
        UsageError: a value of the wrong type.
        AnnotationError: files that are missing or broken.
    """
    name, options = name_of(spec), spec.partition(":")[2]
    if name in lmm_benchmarks.LMM_BENCHMARKS:
        chosen = lmm_benchmarks.read_options(name, options)
        return lmm_benchmarks.load(name, folder, control=control, **chosen)
    if options:
        raise UsageError(f"{name} has no options; got {options!r}")
    return load_benchmark(name, folder, control=control)
