"""The tables of a bundle of runs, as rows of texts; Markdown, LaTeX and the page lay them out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vislm.eval.compare import unlike
from vislm.eval.compare_tables import TableRow, difference_rows, mcnemar_rows, other_count
from vislm.eval.effects import notes
from vislm.report.runs.bundle import Bundle
from vislm.report.runs.scores import Scores

_LONG = 160
"""Characters of a configuration value that are shown."""
_NO_SETTING = ("benchmark",)


@dataclass(frozen=True)
class NamedTable:
    """A table with a headline."""

    title: str
    rows: Sequence[TableRow]
    note: str = ""
    open: bool = field(default=True)
    """Whether the page shows it at once, or on a click."""


def tables(bundle: Bundle, scores: Scores) -> list[NamedTable]:
    """Return all tables of runs on the same samples that have anything to say.

    Scores stand with their standard error (clustered by picture) and, in the first table, their 95 % interval
    (bootstrap over pictures).
    """
    parts = part_rows(bundle, scores)
    found = [
        NamedTable("Results", result_rows(bundle, scores), _RESULTS_NOTE),
        *_differences(bundle, scores),
        NamedTable("By part", parts, "Value ± standard error.", open=len(parts) <= _MOST_OPEN),
        NamedTable("Metrics of the benchmark", metric_rows(bundle), open=len(bundle.runs) == 1),
        NamedTable("What the runs differ in", config_rows(bundle)),
        NamedTable("Configuration", shared_rows(bundle), open=False),
        NamedTable("Left out", broken_rows(bundle), "Broken pictures and rows; nothing takes their place."),
        NamedTable("Warnings", warning_rows(bundle)),
    ]
    return [table for table in found if table.rows]


_MOST_OPEN = 12
"""Rows of a table that the page shows without a click."""
_RESULTS_NOTE = (
    "Value ± standard error and 95 % interval; samples of one picture count as one draw. Tokens: visual tokens left of "
    "an average sample; ms: median per sample."
)


def result_rows(bundle: Bundle, scores: Scores) -> list[TableRow]:
    """Return one row per run: figures (standard error; interval on a second line), counts and costs."""
    found = []
    for n, (run, label) in enumerate(zip(bundle.runs, bundle.labels, strict=True)):
        row: TableRow = {"run": label}
        overall = [c for c in scores.own[n] if c.part == "all"]
        for c in overall:
            interval = scores.intervals[n].get(c.figure.name)
            between = f"\n[{interval.low:.3f}, {interval.high:.3f}]" if interval else ""
            row[c.figure.name] = with_error(c.a, c.a_error) + between + other_count(c.n, overall[0].n)
        row["n"] = len(run.rows)
        row["missing"] = number(run.results, "n_missing") or None
        row["unparsed"] = number(run.results, "n_unparsed") or None
        found.append(row | cost_cells(run.results))
    return _without_empty(found)


def cost_cells(results: Mapping[str, Any]) -> TableRow:
    """Return what an average sample cost, as far as the run says so."""
    tokens, flops, ms = (number(results, key) for key in ("visual_tokens_kept", "flops", "milliseconds"))
    return {
        "tokens": None if tokens is None else f"{tokens:.1f}",
        "GFLOP": None if flops is None else f"{flops / 1e9:.3f}",
        "ms": None if ms is None else f"{ms:.1f}",
        "batch": number(results, "batch_size"),
    }


def part_rows(bundle: Bundle, scores: Scores) -> list[TableRow]:
    """Return one row per run and split or sub-task; none where there is only one."""
    if len(bundle.runs[0].parts) < 2:
        return []
    found: list[TableRow] = []
    for label, figures in zip(bundle.labels, scores.own, strict=True):
        rows: dict[str, TableRow] = {}
        for c in figures:
            row = rows.setdefault(c.part, {"run": label, "part": c.part, "n": c.n})
            row[c.figure.name] = with_error(c.a, c.a_error) + other_count(c.n, int(str(row["n"])))
        found += rows.values()
    return _without_empty(found)


def metric_rows(bundle: Bundle) -> list[TableRow]:
    """Return the benchmark's own metrics: one row per run and group of metrics, plain numbers under an empty group."""
    found: list[TableRow] = []
    for label, run in zip(bundle.labels, bundle.runs, strict=True):
        metrics = run.results.get("metrics")
        if not isinstance(metrics, Mapping):
            continue
        groups = {"": metrics, **{str(k): v for k, v in metrics.items() if isinstance(v, Mapping)}}
        for name, values in groups.items():
            plain = {str(k): round(v, 6) for k, v in values.items() if type(v) in (int, float)}
            if plain:
                found.append({"run": label, "group": name or None, **plain})
    return _without_empty(found)


def config_rows(bundle: Bundle) -> list[TableRow]:
    """Return one row per run with the settings in which the runs differ; none for a single run."""
    configs = [_settings(run.config, run.results) for run in bundle.runs]
    names = [n for n in _names(configs) if len({config.get(n, "") for config in configs}) > 1]
    if not names:
        return []
    return [
        {"run": label, **{n: config.get(n, "") for n in names}}
        for label, config in zip(bundle.labels, configs, strict=True)
    ]


def shared_rows(bundle: Bundle) -> list[TableRow]:
    """Return model, methods, protocol and versions that all runs share."""
    configs = [_settings(run.config, run.results) for run in bundle.runs]
    shared = [n for n in _names(configs) if len({config.get(n, "") for config in configs}) == 1]
    return [{"setting": n, "value": configs[0][n]} for n in shared]


def broken_rows(bundle: Bundle) -> list[TableRow]:
    """Return the samples that could not be asked, each run's first twenty."""
    found: list[TableRow] = []
    for label, run in zip(bundle.labels, bundle.runs, strict=True):
        broken = run.results.get("broken")
        faults = [fault for fault in broken if isinstance(fault, Mapping)] if isinstance(broken, list) else []
        for fault in faults[:20]:
            found.append({"run": label, "sample": str(fault.get("id", "")), "fault": short(fault.get("error", ""))})
        if len(faults) > 20:
            found.append({"run": label, "sample": "", "fault": f"and {len(faults) - 20} more, see results.json"})
    return found


def warning_rows(bundle: Bundle) -> list[TableRow]:
    """Return what the benchmark says about its metrics, e.g. a ratio without denominator."""
    found: list[TableRow] = []
    for label, run in zip(bundle.labels, bundle.runs, strict=True):
        metrics = run.results.get("metrics")
        groups: dict[str, Any] = {"": metrics, **(metrics if isinstance(metrics, Mapping) else {})}
        for name, values in groups.items():
            warnings = values.get("warnings") if isinstance(values, Mapping) else None
            for text in warnings if isinstance(warnings, list) else []:
                found.append({"run": label, "group": str(name) or None, "warning": short(text)})
    return _without_empty(found)


def _differences(bundle: Bundle, scores: Scores) -> list[NamedTable]:
    """Return for every other run its differences to the first, and with several others one table of them all."""
    a, several = bundle.labels[0], len(bundle.runs) > 2
    overall: list[TableRow] = []
    found: list[NamedTable] = []
    for other, comparisons in scores.differences:
        b = bundle.labels[other]
        fields = ", ".join(unlike(bundle.runs[0], bundle.runs[other])) or "nothing in model and methods"
        note = f"A = {a}, B = {b}; they differ in: {fields}. Paired bootstrap over pictures."
        note = " ".join([note, *notes(comparisons)])
        flips = f"{len(bundle.flipped(other))} of {len(bundle.runs[0].rows)} samples have another score."
        rows, tests = difference_rows(comparisons), mcnemar_rows(comparisons)
        overall += [
            {"B": b, **{k: v for k, v in row.items() if k not in _ONE_RUN}} for row in rows if row["part"] == "all"
        ]
        found.append(NamedTable(f"{a} against {b}", rows, note, open=not several))
        found.append(NamedTable(f"McNemar's test, {a} against {b}", tests, flips, open=not several))
    if not several:
        return found
    note = f"A = {a}, over all parts. Paired bootstrap over pictures."
    return [NamedTable(f"{a} against the others", overall, note, open=len(overall) <= 2 * _MOST_OPEN), *found]


_ONE_RUN = ("part", "n", "A", "B")


def _names(configs: Sequence[Mapping[str, str]]) -> list[str]:
    return [name for name in dict.fromkeys(name for config in configs for name in config) if name not in _NO_SETTING]


def _settings(config: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, str]:
    versions = results.get("versions")
    versions = versions if isinstance(versions, Mapping) else {}
    everything = {**config, **{f"version of {k}": v for k, v in versions.items() if k != "vislm"}}
    everything |= {k: results[k] for k in ("batch_size", "processes", "started") if k in results}
    return {str(k): short(value_text(v)) for k, v in everything.items()}


def value_text(value: Any) -> str:
    """Return a value as people read it: texts as they are, lists of texts joined, the rest as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ", ".join(value) or "none"
    return json.dumps(value, ensure_ascii=False, default=str)


def short(value: Any, length: int = _LONG) -> str:
    """Return a text of at most ``length`` characters."""
    text = str(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def with_error(value: float, error: float) -> str:
    """Return ``0.853 ± 0.021``."""
    digits = 1 if abs(value) >= 100 else 3
    return f"{value:.{digits}f}" if math.isnan(error) else f"{value:.{digits}f} ± {error:.{digits}f}"


def number(results: Mapping[str, Any], key: str) -> int | float | None:
    """Return a finite number of a results dictionary, None if it holds none under that key."""
    value = results.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < math.inf else None


def _without_empty(rows: Sequence[TableRow]) -> list[TableRow]:
    """Leave out the columns that are empty in every row."""
    used = {k for row in rows for k, v in row.items() if v is not None}
    return [{k: v for k, v in row.items() if k in used} for row in rows]
