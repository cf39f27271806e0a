"""Curves by layer, strength by distance, and tables of numbers as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vislm.analysis.results import Analysis
from vislm.errors import UsageError
from vislm.report.analysis.heatmaps import CLUSTERS
from vislm.report.png import INK, QUIET, new_figure, plain, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 3.1, 1.75
_COLUMNS = 2


def curve_sheet(analysis: Analysis, out: Path) -> Path:
    """Draw all curves by layer of an analysis; write a PNG and return its path.

    Raises:
        UsageError: an analysis without curves.
    """
    curves = analysis.header.get("curves", {})
    if not curves:
        raise UsageError("the analysis holds no curves by layer")
    columns = min(_COLUMNS, len(curves))
    step = (0.75 + _WIDTH + 1.35, 0.55 + _HEIGHT + 0.5)
    width, height = columns * step[0], -(-len(curves) // columns) * step[1]
    figure = new_figure(width, height)
    for number, (name, about) in enumerate(curves.items()):
        x = 0.75 + (number % columns) * step[0]
        y = height - (number // columns) * step[1] - 0.5 - _HEIGHT
        axes = figure.add_axes((x / width, y / height, _WIDTH / width, _HEIGHT / height))
        values = analysis.tensors[name].float().numpy()
        _lines(axes, values, about["labels"])
        axes.set_title(plain(textwrap.fill(about["title"], 52)), fontsize=9, color=INK, loc="left")
        axes.set_ylabel(plain(about["unit"]), fontsize=8, color=QUIET)
        axes.set_xlabel("layer", fontsize=8, color=QUIET)
        positive = values[np.isfinite(values) & (values > 0)]
        if about["unit"] == "|x|" and positive.size and positive.max() / positive.min() > 50:
            axes.set_yscale("log")
    return save_figure(figure, Path(out))


def hop_figure(analysis: Analysis, out: Path) -> Path:
    """Draw each layer's mean strength by distance, alone and over that of uniform attention; return the PNG's path."""
    hops = analysis.tensors["distance.hop_strength"].nanmean(1).numpy()
    uniform = analysis.tensors["distance.uniform_hops"].numpy()
    figure = new_figure(9.2, 2.9)
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    palette, norm = colormaps["viridis"], Normalize(0, max(1, len(hops) - 1))
    parts = (("attention on patches at a distance", hops), ("the same over that of uniform attention", hops / uniform))
    for number, (title, values) in enumerate(parts):
        axes = figure.add_axes((0.075 + number * 0.455, 0.19, 0.365, 0.66))
        for layer, row in enumerate(values):
            axes.plot(range(len(row)), row, color=palette(norm(layer)), linewidth=1.3)
        if number:
            axes.axhline(1.0, color=QUIET, linewidth=0.8, linestyle="--")
            if values[values > 0].max() / values[values > 0].min() > 8:
                axes.set_yscale("log")
        else:
            axes.plot(range(len(uniform[0])), uniform[0], color=QUIET, linewidth=1, linestyle="--")
            axes.text(
                len(uniform[0]) - 1, uniform[0][-1], " uniform", fontsize=7.5, color=QUIET, va="bottom", ha="right"
            )
        axes.set_title(title, fontsize=9, color=INK, loc="left")
        axes.set_xlabel("hops (Chebyshev distance in patches; 0 = itself)", fontsize=8, color=QUIET)
        _plain_axes(axes)
    from matplotlib.cm import ScalarMappable

    bar = figure.add_axes((0.925, 0.19, 0.012, 0.66))
    drawn = figure.colorbar(ScalarMappable(norm, palette), cax=bar)
    drawn.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    drawn.set_label("layer", fontsize=8, color=QUIET)
    bar.tick_params(labelsize=7, colors=QUIET, length=2)
    return save_figure(figure, Path(out))


def matrix_figure(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, out: Path) -> Path:
    """Draw a labelled table of numbers in [-1, 1] or [0, 1] as colours with the numbers; return the PNG's path."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    diverging = bool(np.nanmin(values) < 0)
    palette, norm = colormaps["RdBu_r" if diverging else "viridis"], Normalize(-1.0 if diverging else 0.0, 1.0)
    cell, left, bottom = 0.58, 1.5, 1.15
    width, height = left + cell * len(columns) + 0.3, bottom + 0.42 * len(rows) + 0.5
    figure = new_figure(max(width, 5.2), height)
    axes = figure.add_axes(
        (left / max(width, 5.2), bottom / height, cell * len(columns) / max(width, 5.2), 0.42 * len(rows) / height)
    )
    axes.imshow(values, cmap=palette, norm=norm, aspect="auto")
    axes.set_facecolor("#eceff2")
    axes.set_xticks(range(len(columns)), [plain(c.replace("_", " ")) for c in columns], rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), [plain(r.replace("_", " ")) for r in rows])
    axes.tick_params(labelsize=7.5, colors=INK, length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(plain(title), fontsize=9, color=INK, loc="left")
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            axes.text(column, row, "-", ha="center", va="center", fontsize=7.5, color=QUIET)
            continue
        red, green, blue, _ = palette(norm(value))
        colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else INK
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
    return save_figure(figure, Path(out))


def _lines(axes: Axes, values: np.ndarray, labels: Sequence[str]) -> None:
    layers = range(values.shape[1])
    ends: list[tuple[float, str, str]] = []
    for number, (row, label) in enumerate(zip(values, labels, strict=True)):
        colour = CLUSTERS[number % len(CLUSTERS)]
        axes.plot(layers, row, color=colour, linewidth=1.5, marker="o", markersize=2.5)
        ends.append((number, label, colour))
    for number, label, colour in ends:
        place = 1.0 - (number + 0.5) / max(len(ends), 5)
        axes.text(1.03, place, plain(textwrap.shorten(label, 22)), transform=axes.transAxes, fontsize=7.5, color=colour)
    axes.set_xticks(range(0, values.shape[1], max(1, -(-values.shape[1] // 8))))
    _plain_axes(axes)


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c3ccd5")
    axes.tick_params(labelsize=7.5, colors=QUIET, length=2)
    axes.grid(axis="y", color="#eceff2", linewidth=0.8)
