"""Drawing panels over a picture: one row for each query."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from vislm.report.attention_views.painting import (
    LINE,
    cell,
    draw_bar,
    draw_classes,
    draw_lines,
    draw_query,
    draw_values,
    rendered,
)
from vislm.report.attention_views.panel import Panel, Sheet
from vislm.report.png import INK, QUIET, new_figure, plain, save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIDE, _GAP, _EDGE = 2.05, 0.22, 0.2
_HEAD, _MARGIN, _BAR, _FOOT = 0.24, 0.07, 0.09, 0.2
"""Inches: a panel's larger side, between panels, at the edges; title, around a note, colour scale, its text."""
_CHARACTERS = 16
"""Characters of a note that surely fit into an inch."""


def draw_sheet(sheet: Sheet, out: Path) -> Path:
    """Draw a sheet, write it as PNG and return its path."""
    longer = max(sheet.picture.size)
    wide, tall = (_SIDE * side / longer for side in sheet.picture.size)
    column = max(wide, 1.75)  # titles and notes need some width
    columns = max(len(panels) for _, panels in sheet.rows)
    heights = [_HEAD + tall + max(_below(panel, column) for panel in panels) for _, panels in sheet.rows]
    width = max(2 * _EDGE + columns * column + (columns - 1) * _GAP, 3.0)
    lines = [
        *(
            (line, {"fontsize": 10.5, "weight": "bold", "color": INK})
            for line in _wrapped(sheet.title, width - 2 * _EDGE, 11.0)
        ),
        *((line, {"fontsize": 8.5, "color": QUIET}) for line in _wrapped(sheet.subtitle, width - 2 * _EDGE, 14.5)),
    ]
    height = 2 * _EDGE + 0.2 * len(lines) + 0.1 + sum(heights) + (len(heights) - 1) * _GAP
    figure = new_figure(width, height)
    top = height - _EDGE
    for line, style in lines:
        figure.text(_EDGE / width, top / height, plain(line), va="top", **style)
        top -= 0.2
    top -= 0.1
    for (place, panels), row_height in zip(sheet.rows, heights, strict=True):
        for index, panel in enumerate(panels):
            _draw_panel(figure, sheet, panel, place, (_EDGE + index * (column + _GAP), top, wide, tall, column))
        top -= row_height + _GAP
    return save_picture(rendered(figure), out)


def _below(panel: Panel, column: float) -> float:
    """Return the height of what stands below a panel, in inches."""
    key = LINE * len(panel.classes) if panel.classes else _BAR + _FOOT if panel.values is not None else 0.0
    return _MARGIN + len(_wrapped(panel.note, column)) * LINE + (_MARGIN if key else 0.0) + key


def _draw_panel(
    figure: Figure, sheet: Sheet, panel: Panel, place: tuple[int, int], box: tuple[float, float, float, float, float]
) -> None:
    """Draw a panel with its upper left corner at x and top inches, counted from the lower left."""
    x, top, wide, tall, column = box
    width, height = figure.get_size_inches()
    figure.text(x / width, (top - 0.15) / height, plain(panel.title), fontsize=9, weight="bold", color=INK)
    bottom = top - _HEAD - tall
    axes = figure.add_axes((x / width, bottom / height, wide / width, tall / height))
    drawn = draw_values(axes, sheet, panel)
    if panel.values is None or panel.values.ndim == 2:
        size = cell(sheet)
        axes.set(xlim=(0, sheet.picture.width), ylim=(sheet.picture.height, 0))
        draw_lines(axes, panel, size)
        draw_query(axes, place, size)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color="#c4ccd4", linewidth=0.6)
    below = bottom - _MARGIN
    for line in _wrapped(panel.note, column):
        below -= LINE
        figure.text(x / width, (below + 0.03) / height, plain(line), fontsize=7.5, color=QUIET)
    below -= _MARGIN
    if panel.classes:
        draw_classes(figure, panel, (x, below))
    elif drawn is not None:
        bar = figure.add_axes((x / width, (below - _BAR) / height, column / width, _BAR / height))
        draw_bar(bar, drawn, panel.unit)


def _wrapped(text: str, side: float, characters: float = _CHARACTERS) -> list[str]:
    return textwrap.wrap(text, max(12, int(side * characters)))
