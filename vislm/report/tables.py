"""Tables as plain text and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Cell = str | int | float | None
Rows = Sequence[Mapping[str, Cell]]
"""Rows of a table: column name -> value; a missing column is an empty cell."""


def text_table(rows: Rows, columns: Sequence[str] | None = None) -> str:
    """Return an aligned table for the terminal: numbers to the right, text to the left.

    Args:
        rows: one mapping per row.
        columns: names and order of the columns; default: all, in order of appearance.
    """
    names, cells = _cells(rows, columns)
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    right = [is_numeric(rows, name) for name in names]

    def line(texts: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(texts, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(names), line(["-" * width for width in widths]), *map(line, cells)])


def markdown_table(rows: Rows, columns: Sequence[str] | None = None) -> str:
    """Return the table in GitHub's Markdown; pipes and line breaks in cells are escaped. Arguments as in text_table."""
    names, cells = _cells(rows, columns)
    rule = ["---:" if is_numeric(rows, name) else "---" for name in names]

    def line(texts: Sequence[str]) -> str:
        return f"| {' | '.join(texts)} |"

    return "\n".join([line([_escape(n) for n in names]), line(rule), *(line([_escape(c) for c in r]) for r in cells)])


def metrics_table(results: Mapping[str, Any]) -> str:
    """Return the metrics of a results dictionary of :func:`vislm.eval.running.runner.run` for the terminal.

    Nested metrics (one group per split) become one row per split; ``per_group`` follows as a second table.
    """
    head = f"{results.get('benchmark', 'benchmark')}: {results.get('n', '?')} samples"
    if results.get("n_missing"):
        head += f", {results['n_missing']} MISSING"
    blocks = [head, _group_table(results.get("metrics", {}))]
    if results.get("per_group"):
        blocks.append(_group_table(results["per_group"]))
    return "\n\n".join(block for block in blocks if block)


def table_columns(rows: Rows, columns: Sequence[str] | None = None) -> list[str]:
    """Return the column names: as given, or all in order of appearance."""
    return list(columns) if columns is not None else list(dict.fromkeys(name for row in rows for name in row))


def format_cell(value: Cell) -> str:
    """Return a cell's text: floats with three decimals (one from 100 on), an empty string for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"
    return str(value)


def _group_table(metrics: Mapping[str, Any]) -> str:
    """Lay out metrics: nested groups as rows, plain values as one table of name and value."""
    groups = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    plain = {name: value for name, value in metrics.items() if not isinstance(value, (Mapping, list, tuple))}
    blocks = []
    if plain:
        blocks.append(text_table([{"metric": name, "value": value} for name, value in plain.items()]))
    if groups:
        flat = {n: {k: v for k, v in g.items() if not isinstance(v, (Mapping, list, tuple))} for n, g in groups.items()}
        rows = [{"group": name, **figures} for name, figures in flat.items() if figures]
        blocks += [text_table(rows)] if rows else []
    return "\n\n".join(blocks)


def _cells(rows: Rows, columns: Sequence[str] | None) -> tuple[list[str], list[list[str]]]:
    names = table_columns(rows, columns)
    return names, [[format_cell(row.get(name)) for name in names] for row in rows]


def is_numeric(rows: Rows, name: str) -> bool:
    """Return whether every filled cell of a column is a number or reads like one."""
    values = [value for row in rows if (value := row.get(name)) is not None]
    return bool(values) and all(isinstance(value, (int, float)) or _looks_numeric(value) for value in values)


def _looks_numeric(text: str) -> bool:
    return text == "-" or text.lstrip("-+")[:1].isdigit()


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")
