"""Tables in LaTeX, with booktabs; every text of a cell is escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vislm.report.tables import Rows, format_cell, is_numeric, table_columns

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    "…": r"\dots{}",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_TAKEN = re.compile(r"^([\[*])")


def latex_escape(text: str) -> str:
    """Return text that LaTeX typesets as it is; line breaks and control characters become spaces."""
    plain = _CONTROL.sub(" ", text)
    return "".join(_SPECIAL.get(character, character) for character in plain)


def latex_table(rows: Rows, columns: Sequence[str] | None = None, *, caption: str = "", label: str = "") -> str:
    r"""Return a ``table`` environment; the preamble needs ``\usepackage{booktabs}`` (and UTF-8, which is the default).

    Args:
        rows: one mapping per row.
        columns: names and order of the columns; default: all, in order of appearance.
        caption: text above the table.
        label: of ``\label``; letters, digits, ``:`` and ``-`` only.

    Raises:
        ValueError: a label with other characters.
    """
    if not re.fullmatch(r"[A-Za-z0-9:-]*", label):
        raise ValueError(f"label {label!r}: expected letters, digits, ':' and '-'")
    names = table_columns(rows, columns)
    kinds = "".join("r" if is_numeric(rows, name) else "l" for name in names)
    head = [r"\begin{table}[htbp]", r"\centering"]
    head += [rf"\caption{{{latex_escape(caption)}}}"] if caption else []
    head += [rf"\label{{{label}}}"] if label else []
    body = [_line([format_cell(row.get(name)) for name in names]) for row in rows]
    begin = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", _line(names), r"\midrule"]
    return "\n".join([*head, *begin, *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _line(cells: Sequence[str]) -> str:
    return " & ".join(map(_cell, cells)) + r" \\"


def _cell(text: str) -> str:
    """Escape a cell; braces keep a bracket or star from becoming part of the line break before it."""
    return _TAKEN.sub(r"{\1}", latex_escape(text))
