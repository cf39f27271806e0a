"""Sheets of layer x head maps."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vislm.analysis.results import Analysis
from vislm.errors import UsageError
from vislm.report.png import INK, QUIET, new_figure, plain, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 4
_LABELLED = 8
"""Cells carry their value in maps with at most this many heads and twice as many layers."""
_EMPTY = "#eceff2"
CLUSTERS = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f"),
    *("#ff9da7", "#bab0ac", "#1f3b63", "#7f4a10"),
)
"""Colours of clusters, by number."""


def is_clusters(name: str) -> bool:
    """Return whether a measure holds numbers of clusters and not amounts."""
    return name.endswith(".cluster")


def colour_range(values: np.ndarray) -> tuple[float, float, bool]:
    """Return (low, high, diverging) to colour values by: around 0 if some are negative, else from 0 or the minimum."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0, False
    low, high = float(finite.min()), float(finite.max())
    if low < 0.0:
        reach = max(-low, high, 1e-12)
        return -reach, reach, True
    if high == 0.0:
        return 0.0, 1.0, False
    start = 0.0 if low / high < 0.6 else low
    return start, max(high, start + 1e-9 * abs(start)), False


def head_sheet(analysis: Analysis, out: Path, prefix: str | None = None) -> Path:
    """Draw the measures of an analysis, layers down and heads to the right; write a PNG and return its path.

    Args:
        analysis: from ``vislm.analysis``.
        out: PNG file to write.
        prefix: only measures whose names begin so, such as "importance."; None: all.

    Raises:
        UsageError: there is no such measure.
    """
    names = [name for name in analysis.header.get("measures", {}) if prefix is None or name.startswith(prefix)]
    if not names:
        raise UsageError(f"the analysis holds no head map{'' if prefix is None else f' named {prefix}...'}")
    maps = [analysis.tensors[name].float().numpy() for name in names]
    layers, heads = (max(m.shape[axis] for m in maps) for axis in (0, 1))
    cell = max(0.085, min(0.42, 3.0 / max(heads, layers / 1.3)))
    side, tall = max(heads * cell, 1.9), max(layers * cell, 1.2)
    columns = min(_COLUMNS, len(maps))
    rows = -(-len(maps) // columns)
    step = (0.62 + side + 0.68, 0.5 + tall + 0.52)
    width, height = columns * step[0] + 0.15, rows * step[1] + 0.1
    figure = new_figure(width, height)
    for number, (name, values) in enumerate(zip(names, maps, strict=True)):
        x = 0.62 + (number % columns) * step[0]
        y = height - (number // columns) * step[1] - 0.5 - tall
        axes = figure.add_axes((x / width, y / height, side / width, tall / height))
        bar = figure.add_axes(((x + side + 0.08) / width, y / height, 0.09 / width, tall / height))
        title = textwrap.fill(analysis.header["measures"][name], max(16, int((side + 0.5) * 13)))
        _draw(figure, axes, bar, values, title, is_clusters(name))
    return save_figure(figure, Path(out))


def _draw(figure: Figure, axes: Axes, bar: Axes, values: np.ndarray, title: str, clusters: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize

    layers, heads = values.shape
    low, high, diverging = colour_range(values)
    if clusters:
        count = max(1, int(np.nanmax(values)) + 1)
        palette = ListedColormap([CLUSTERS[n % len(CLUSTERS)] for n in range(count)])
        norm = BoundaryNorm(np.arange(count + 1) - 0.5, count)
        values = np.where(values < 0, np.nan, values)
    else:
        palette, norm = colormaps["RdBu_r" if diverging else "viridis"], Normalize(low, high)
    drawn = axes.imshow(values, cmap=palette, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_facecolor(_EMPTY)
    axes.set_title(plain(title), fontsize=8.5, color=INK, loc="left", pad=5)
    axes.set_xlabel("head", fontsize=7.5, color=QUIET, labelpad=1)
    axes.set_ylabel("layer", fontsize=7.5, color=QUIET, labelpad=2)
    axes.set_xticks(range(0, heads, max(1, -(-heads // 8))))
    axes.set_yticks(range(0, layers, max(1, -(-layers // 8))))
    axes.tick_params(labelsize=7, colors=QUIET, length=0, pad=2)
    axes.spines[:].set_visible(False)
    if heads <= _LABELLED and layers <= 2 * _LABELLED:
        _write_values(axes, values, palette, norm, clusters)
    colour_bar = figure.colorbar(drawn, cax=bar)
    colour_bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    if clusters:
        colour_bar.set_ticks(list(range(int(np.nanmax(values)) + 1)))
    bar.tick_params(labelsize=6.5, colors=QUIET, length=2, pad=2)


def _write_values(axes: Axes, values: np.ndarray, palette, norm, clusters: bool) -> None:
    for (layer, head), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        red, green, blue, _ = palette(norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        text = f"{value:.0f}" if clusters else short(float(value))
        axes.text(head, layer, text, ha="center", va="center", fontsize=6.5, color="white" if dark else INK)


def short(value: float) -> str:
    """Return a number in at most about seven characters."""
    if value == 0.0:
        return "0"
    if abs(value) < 0.01 or abs(value) >= 10000:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}"
