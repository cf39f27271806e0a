"""Pictures of attention patterns, drawn from their masks: what one query sees, and the whole mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vislm.errors import UsageError
from vislm.kernels import Blocked, Causal, Dense, GridPattern, Neighborhood, Padded, Pattern, Window
from vislm.report.png import INK, QUIET, new_figure, plain, save_figure

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEEN, HIDDEN, QUERY = "#0072b2", "#e3e8ed", "#d55e00"
"""Blue, light grey and vermilion: told apart by colour-blind readers, and in grey."""
_DPI = 110
_SIDE, _GAP, _HEAD, _FOOT, _EDGE = 216, 26, 30, 44, 18
"""Pixels of a square, between squares, above a row of them for its title, below all of them, and at the edges."""


@dataclass(frozen=True)
class Panel:
    """One pattern to draw.

    Attributes:
        title: stands above it.
        pattern: a grid pattern, or any pattern with ``sizes``.
        query: coordinates of a query on the query grid, whose keys are drawn beside the mask; None = the mask only.
        sizes: numbers of queries and keys, for patterns without a grid.
    """

    title: str
    pattern: Pattern
    query: tuple[int, ...] | None = None
    sizes: tuple[int, int] | None = None


def pattern_figure(panels: Sequence[Panel], out: Path, columns: int = 2) -> Path:
    """Draw panels in rows of ``columns`` and write them as PNG; return its path.

    Raises:
        UsageError: no panels, a pattern whose size is not known, a grid of 3 axes, or a query outside its grid.
    """
    if not panels:
        raise UsageError("no patterns to draw; give at least one")
    masks = [pattern_mask(panel) for panel in panels]
    squares = 2 if any(panel.query is not None for panel in panels) else 1
    width = 2 * _EDGE + columns * squares * (_SIDE + _GAP) - _GAP + (columns - 1) * _GAP
    rows = -(-len(panels) // columns)
    height = rows * (_HEAD + _SIDE) + (rows - 1) * _GAP + _FOOT
    figure = new_figure(width / _DPI, height / _DPI)
    for number, (panel, mask) in enumerate(zip(panels, masks, strict=True)):
        row, column = divmod(number, columns)
        x = _EDGE + column * (squares * (_SIDE + _GAP) + _GAP)
        y = height - (row + 1) * (_HEAD + _SIDE) - row * _GAP
        figure.text(x / width, (y + _SIDE + 9) / height, plain(panel.title), fontsize=9, color=INK)
        if panel.query is not None:
            _draw_keys(_square(figure, x, y), panel, mask)
            x += _SIDE + _GAP
        _draw_mask(_square(figure, x, y), panel, mask)
    figure.text(_EDGE / width, 12 / height, _legend(squares), fontsize=8, color=QUIET)
    return save_figure(figure, out, _DPI)


def pattern_mask(panel: Panel) -> np.ndarray:
    """Return the panel's mask as a bool array ``(Nq, Nk)``, prefix queries first where there are as many as keys."""
    pattern = panel.pattern
    if panel.sizes is not None:
        queries, keys = panel.sizes
    elif isinstance(pattern, GridPattern):
        keys = pattern.prefix + math.prod(pattern.grid)
        queries = pattern.prefix + math.prod(pattern.query_grid)
    else:
        raise UsageError(f"{type(pattern).__name__} has no grid: give sizes=(queries, keys)")
    position = torch.arange(queries) + keys - queries
    mask = pattern.mask(position[:, None], torch.arange(keys)[None])
    return mask.reshape(-1, *mask.shape[-2:])[0].expand(queries, keys).numpy()


def gallery() -> Mapping[str, Sequence[Panel]]:
    """Return file name -> panels: the pictures of the documentation."""
    grid, inner, corner = (9, 9), (4, 3), (0, 7)
    valid = torch.arange(12)[None] >= 4
    return {
        "pattern_sequence.png": [
            Panel("Dense()", Dense(), sizes=(12, 12)),
            Panel("Causal()", Causal(), sizes=(12, 12)),
            Panel("Causal(), decoding 4 tokens", Causal(), sizes=(4, 12)),
            Panel("Padded(valid): right padding", Padded(valid.flip(1)), sizes=(12, 12)),
            Panel("Padded(valid): left padding", Padded(valid), sizes=(12, 12)),
            Panel("Padded(valid, causal=True)", Padded(valid, causal=True), sizes=(12, 12)),
        ],
        "pattern_neighborhood.png": [
            Panel("Neighborhood(grid, window=5)", Neighborhood(grid, 5), inner),
            Panel("at a corner the window is pushed inward", Neighborhood(grid, 5), corner),
            Panel("dilation=2, window=3", Neighborhood(grid, 3, dilation=2), inner),
            Panel("stride=3: blocks of 3 x 3 queries share a window", Neighborhood(grid, 5, stride=3), inner),
            Panel("causal=True", Neighborhood(grid, 5, causal=True), inner),
            Panel("border='mask': the window is cut instead", Neighborhood(grid, 5, border="mask"), corner),
            Panel("window=(9, 3), one size per axis", Neighborhood(grid, (9, 3)), inner),
            Panel("prefix=1: a class token in front", Neighborhood(grid, 5, prefix=1), inner),
        ],
        "pattern_halo.png": [
            Panel("Blocked(grid, block=3, halo=1)", Blocked(grid, 3, 1), inner),
            Panel("at a corner", Blocked(grid, 3, 1), corner),
        ],
        "pattern_window.png": [
            Panel("Window(grid, window=3)", Window(grid, 3), inner),
            Panel("Window(grid, window=3, shift=1)", Window(grid, 3, 1), inner),
        ],
    }


def draw_gallery(folder: Path) -> list[Path]:
    """Draw all pictures of :func:`gallery` into a folder; return their paths."""
    return [
        pattern_figure(panels, folder / name, columns=2 if panels[0].query is not None else 3)
        for name, panels in gallery().items()
    ]


def _query_index(panel: Panel) -> int:
    """Return the row of the mask that belongs to the panel's query."""
    pattern, query = panel.pattern, panel.query
    if not isinstance(pattern, GridPattern) or query is None or len(pattern.grid) > 2:
        raise UsageError(
            f"query={query} of {type(pattern).__name__}: what a query sees is drawn on grids of 1 or 2 axes"
        )
    sizes = pattern.query_grid
    if len(query) != len(sizes) or not all(0 <= place < size for place, size in zip(query, sizes, strict=False)):
        raise UsageError(f"{query=} is not a place on the query grid {sizes}")
    index = 0
    for place, size in zip(query, sizes, strict=True):
        index = index * size + place
    return pattern.prefix + index


def _draw_keys(axes: Axes, panel: Panel, mask: np.ndarray) -> None:
    """Draw the grid of keys and mark the query; prefix tokens stand above the grid."""
    import numpy as np

    row = mask[_query_index(panel)]
    pattern, query = panel.pattern, panel.query
    assert isinstance(pattern, GridPattern)
    assert query is not None
    height, width = pattern.grid if len(pattern.grid) == 2 else (1, *pattern.grid)
    lines = -(-pattern.prefix // width)
    cells = np.full((lines + height, width), np.nan)
    cells.reshape(-1)[: pattern.prefix] = row[: pattern.prefix]
    cells[lines:] = row[pattern.prefix :].reshape(height, width)
    _show(axes, cells)
    axes.set_xticks(np.arange(-0.5, width), minor=True)
    axes.set_yticks(np.arange(-0.5, lines + height), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    stands = [int(pattern.anchor(axis, torch.tensor(place))) for axis, place in enumerate(query)]
    y, x = (0, *stands) if len(stands) == 1 else stands
    axes.plot(x, y + lines, "o", color=QUERY, markeredgecolor="white", markersize=8)


def _draw_mask(axes: Axes, panel: Panel, mask: np.ndarray) -> None:
    import numpy as np

    _show(axes, mask.astype(float))
    if max(mask.shape) <= 24:
        axes.set_xticks(np.arange(-0.5, mask.shape[1]), minor=True)
        axes.set_yticks(np.arange(-0.5, mask.shape[0]), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
    if panel.query is not None:
        axes.plot(-3.2, _query_index(panel), ">", color=QUERY, markersize=6, clip_on=False)


def _show(axes: Axes, cells: np.ndarray) -> None:
    """Draw cells: 1 = seen, 0 = hidden, NaN = nothing there."""
    from matplotlib.colors import ListedColormap

    limits = (-0.5, cells.shape[1] - 0.5), (cells.shape[0] - 0.5, -0.5)
    axes.imshow(cells, cmap=ListedColormap([HIDDEN, SEEN]), vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    axes.set(xlim=limits[0], ylim=limits[1], anchor="NW")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)


def _square(figure: Figure, x: float, y: float) -> Axes:
    width, height = (side * _DPI for side in figure.get_size_inches())
    return figure.add_axes((x / width, y / height, _SIDE / width, _SIDE / height))


def _legend(squares: int) -> str:
    mask = "rows are queries, columns are keys; blue = attends"
    if squares == 1:
        return mask
    return f"Left: the keys (blue) that the query (dot) sees. Right: the mask, {mask}; the arrow is the query's row."
