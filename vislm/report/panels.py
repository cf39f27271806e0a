"""A sheet of small pictures with a title above and a caption below each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vislm.errors import UsageError
from vislm.report.png import BAD, GOOD, INK, QUIET, new_figure, plain, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GAP, _ROW_GAP = 0.22, 0.16
_LINE = 0.155
"""Height of a line of small text in inches."""
_MARGIN = 0.25
_CHARACTERS = 17
"""Characters of small text that surely fit into an inch."""
_MAX_CAPTION_LINES = 4


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet. ``good`` colours the caption: True for a right answer, False for a wrong one."""

    picture: Image.Image
    title: str
    subtitle: str = ""
    caption: str = ""
    good: bool | None = None


def panel_figure(rows: Sequence[Sequence[Panel]], out: Path, title: str = "", *, side: float = 2.1) -> Path:
    """Draw rows of panels and write them as PNG; rows may have different lengths.

    Args:
        rows: panels, row by row.
        out: PNG file to write; its path is returned.
        title: headline.
        side: width of a panel in inches.

    Raises:
        UsageError: no panel at all.
    """
    if not any(rows):
        raise UsageError("no panels to draw; give at least one picture")
    columns = max(len(row) for row in rows)
    heights = [_row_height(row, side) for row in rows]
    head = 0.4 if title else 0.0
    width = 2 * _MARGIN + columns * side + (columns - 1) * _GAP
    height = 2 * _MARGIN + head + sum(heights) - _ROW_GAP
    figure = new_figure(width, height)
    if title:
        top = 1 - _MARGIN / height
        figure.text(_MARGIN / width, top, plain(title), fontsize=12, weight="bold", color=INK, va="top")
    top = height - _MARGIN - head
    for row, row_height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            _draw(figure, panel, _MARGIN + column * (side + _GAP), top, side)
        top -= row_height
    return save_figure(figure, out)


def _row_height(row: Sequence[Panel], side: float) -> float:
    pictures = max((side * panel.picture.height / panel.picture.width for panel in row), default=0.0)
    lines = max((len(_wrap(panel.caption, side)) for panel in row), default=0)
    return max(map(_head_height, row), default=0.0) + pictures + 0.08 + lines * _LINE + _ROW_GAP


def _head_height(panel: Panel) -> float:
    return (1 + bool(panel.subtitle)) * 0.18 + 0.05


def _draw(figure: Figure, panel: Panel, left: float, top: float, side: float) -> None:
    """Draw a panel whose upper left corner lies at ``left`` and ``top`` inches, counted from the lower left."""
    width, height = figure.get_size_inches()
    x, baseline = left / width, top - 0.16
    figure.text(x, baseline / height, plain(panel.title), fontsize=9, weight="bold", color=INK)
    if panel.subtitle:
        figure.text(x, (baseline - 0.18) / height, plain(panel.subtitle), fontsize=8, color=QUIET)
    tall = side * panel.picture.height / panel.picture.width
    bottom = top - _head_height(panel) - tall
    axes = figure.add_axes((x, bottom / height, side / width, tall / height))
    axes.imshow(panel.picture, interpolation="antialiased", aspect="auto")  # pyright: ignore[reportArgumentType]
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color="#c4ccd4", linewidth=0.6)
    colour = QUIET if panel.good is None else GOOD if panel.good else BAD
    for number, line in enumerate(_wrap(panel.caption, side)):
        figure.text(x, (bottom - 0.08 - (number + 0.75) * _LINE) / height, plain(line), fontsize=8, color=colour)


def _wrap(caption: str, side: float) -> list[str]:
    columns = max(12, round(side * _CHARACTERS))
    lines = [line for part in caption.splitlines() for line in textwrap.wrap(part, columns)]
    if len(lines) > _MAX_CAPTION_LINES:
        lines = [*lines[: _MAX_CAPTION_LINES - 1], f"{lines[_MAX_CAPTION_LINES - 1][: columns - 4]} ..."]
    return lines
