"""Rows of the tables that ``vislm compare`` prints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vislm.eval.compare import Comparison, RunRecord, check_same, figure_interval, samples_of

TableRow = dict[str, str | int | float | None]


def difference_rows(found: Sequence[Comparison]) -> list[TableRow]:
    """Return one row per part and figure: both values with their standard errors, A - B with its 95 % interval, p."""
    return [
        {
            "part": c.part,
            "figure": c.figure.name,
            "n": c.n,
            "A": f"{c.a:.3f} ± {c.a_error:.3f}",
            "B": f"{c.b:.3f} ± {c.b_error:.3f}",
            "A - B": f"{c.difference.value:+.3f}",
            "95 %": f"[{c.difference.low:+.3f}, {c.difference.high:+.3f}]",
            "p": _p(c.difference.p),
            "better": _better(c),
        }
        for c in found
    ]


def mcnemar_rows(found: Sequence[Comparison]) -> list[TableRow]:
    """Return one row per part: samples on which A alone, or B alone, has the higher score, and McNemar's exact p."""
    first = {c.part: c.difference for c in reversed(found)}
    return [
        {"part": part, "A better": d.wins, "B better": d.losses, "McNemar p": _p(d.mcnemar)}
        for part, d in ((c.part, first.pop(c.part)) for c in found if c.part in first)
    ]


def sweep_rows(runs: Sequence[RunRecord], *, resamples: int = 2000) -> list[TableRow]:
    """Return one row per run: figures with 95 % intervals, visual tokens, FLOPs and milliseconds of a sample.

    A figure over another number of samples than the first one says so, e.g. an AUROC where some answers lack logits.

    Raises:
        UsageError: runs that followed different protocols or finished different samples.
    """
    for other in runs[1:]:
        check_same(runs[0], other)
    names = labels(runs)
    return [_sweep_row(name, run, resamples) for name, run in zip(names, runs, strict=True)]


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return for each run its methods with the options that vary among the runs, or "all tokens".

    The folder follows where that does not tell the runs apart.
    """
    methods = [[_parsed(text) for text in run.config.get("interventions") or ()] for run in runs]
    seen: dict[str, set[tuple[str, str]]] = {}
    for name, options in (method for several in methods for method in several):
        seen.setdefault(name, set()).update(options)
    named = [" + ".join(_label(name, options, seen[name]) for name, options in m) or "all tokens" for m in methods]
    return [n if named.count(n) == 1 else f"{n} ({_short(run.folder)})" for n, run in zip(named, runs, strict=True)]


def _parsed(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Take a method's representation apart: FlowCut(keep=8, layer=1) -> name and options."""
    name, _, rest = text.partition("(")
    found = re.findall(r"(\w+)=((?:[^,()\[\]]|\([^()]*\)|\[[^\[\]]*\])*)", rest.removesuffix(")"))
    return name, [(key, value) for key, value in found]


def _label(name: str, options: Sequence[tuple[str, str]], seen: set[tuple[str, str]]) -> str:
    keys = [key for key, _ in seen]
    shown = [f"{k}={v}" for n, (k, v) in enumerate(options) if n == 0 or keys.count(k) > 1]
    return f"{name}({', '.join(shown)})" if shown else name


def config_rows(a: RunRecord, b: RunRecord, fields: Sequence[str]) -> list[TableRow]:
    """Return the fields of model and methods that differ, one per row."""
    return [{"setting": f, "A": str(a.config.get(f, "-")), "B": str(b.config.get(f, "-"))} for f in fields]


def _sweep_row(name: str, run: RunRecord, resamples: int) -> TableRow:
    row: TableRow = {"run": name}
    counts = [samples_of(run, figure) for figure in run.figures]
    for figure, n in zip(run.figures, counts, strict=True):
        found = figure_interval(run, figure, resamples=resamples)
        row[figure.name] = f"{found}{other_count(n, counts[0])}" if found is not None else None
    results: Mapping[str, Any] = run.results
    if "visual_tokens_kept" in results:
        row["tokens"] = f"{results['visual_tokens_kept']:.1f}"
    if "flops" in results:
        row["GFLOP"] = f"{results['flops'] / 1e9:.3f}"
    if "milliseconds" in results:
        row["ms"] = f"{results['milliseconds']:.1f}"
    row["batch"] = results.get("batch_size")
    return row


def other_count(n: int, first: int) -> str:
    """Return what to put behind a figure over ``n`` samples in a row whose first figure is over ``first``."""
    return "" if n == first else f", n = {n}"


def _better(c: Comparison) -> str:
    if c.figure.better == "neither" or c.difference.low <= 0.0 <= c.difference.high:
        return "-"
    return "A" if (c.difference.value > 0) == (c.figure.better == "higher") else "B"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _short(folder: Path) -> str:
    return "/".join(folder.parts[-2:])
