"""Painting a panel: values, lines, the query's mark, and the key to the colours."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vislm.report.attention_views.panel import Panel, Sheet
from vislm.report.png import INK, QUIET, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

QUERY = "#d55e00"
"""Vermilion, which colour-blind readers tell from the scale of the weights."""
CLASSES = ("#4477aa", "#ccbb44", "#ee6677", "#228833")
"""Colours of classes, told apart by colour-blind readers (Tol's bright scheme)."""
SCALE = "viridis"
OPACITY, FADE = 0.78, 0.55
"""Of the weights over the picture; of the grey picture towards white."""
DPI = 110
LINE = 0.15
"""Height of a line of small text in inches."""
_COLOURS = 256
"""Colours of the file: photographs stay small."""
_WHITE = 246
"""Colours whose channels are all at least this are white."""
_LEAST = 0.035
"""The query's mark is at least this part of the panel's width."""


def draw_values(axes: Axes, sheet: Sheet, panel: Panel) -> AxesImage | None:
    """Draw the picture, and the values over it; return what a colour bar is for."""
    size = (0, sheet.picture.width, sheet.picture.height, 0)
    if panel.values is None:
        axes.imshow(sheet.picture, extent=size, aspect="auto")  # pyright: ignore[reportArgumentType]
        return None
    if panel.values.ndim == 4:
        return _draw_small_maps(axes, sheet, panel)
    grey = np.asarray(sheet.picture.convert("L"), dtype=float)
    axes.imshow(grey + FADE * (255 - grey), cmap="gray", vmin=0, vmax=255, extent=size, aspect="auto")
    height, width = (side * step for side, step in zip(sheet.grid, cell(sheet), strict=True))
    options = {"extent": (0, width, height, 0), "aspect": "auto", "interpolation": "nearest", "alpha": OPACITY}
    if panel.classes:
        axes.imshow(panel.values, cmap=_class_colours(panel), vmin=-0.5, vmax=len(panel.classes) - 0.5, **options)
        return None
    return axes.imshow(panel.values, cmap=SCALE, **options)


def _draw_small_maps(axes: Axes, sheet: Sheet, panel: Panel) -> AxesImage:
    """Draw maps ``(rows, columns, h, w)`` as tiles with white lines between them."""
    assert panel.values is not None
    rows, columns, height, width = panel.values.shape
    x, y, wide, tall = axes.get_position().bounds
    part = tall * rows / max(rows, columns), wide * columns / max(rows, columns)
    axes.set_position((x, y + tall - part[0], part[1], part[0]))
    whole = panel.values.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    axes.set_facecolor("#e3e8ed")
    image = axes.imshow(whole, cmap=SCALE, aspect="auto", interpolation="nearest")
    for line in range(1, rows):
        axes.axhline(line * height - 0.5, color="white", linewidth=1.4)
    for line in range(1, columns):
        axes.axvline(line * width - 0.5, color="white", linewidth=1.4)
    for number, label in enumerate(panel.labels):
        row, column = divmod(number, columns)
        place = (column * width - 0.5 + width * 0.06, row * height - 0.5 + height * 0.06)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
        axes.text(*place, plain(label), fontsize=7, color=INK, va="top", ha="left", bbox=box)
    return image


def draw_lines(axes: Axes, panel: Panel, patch: tuple[float, float]) -> None:
    """Draw the borders between regions, and the frame."""
    if panel.regions is not None:
        thin = 0.5 if max(panel.regions.shape) > 40 else 0.8
        _strokes(axes, _borders(panel.regions, patch, closed=False), (INK, 2 * thin, 0.35), ("white", thin, 0.95))
    if panel.frame is not None:
        _strokes(axes, _borders(panel.frame.astype(int), patch, closed=True), ("white", 2.2, 0.9), (INK, 1.0, 1.0))


def _strokes(axes: Axes, segments: np.ndarray, *strokes: tuple[str, float, float]) -> None:
    from matplotlib.collections import LineCollection

    for colour, linewidth, alpha in strokes:
        axes.add_collection(
            LineCollection(list(segments), colors=colour, linewidths=linewidth, alpha=alpha, capstyle="projecting")
        )


def _borders(regions: np.ndarray, patch: tuple[float, float], *, closed: bool) -> np.ndarray:
    """Return the edges ``(S, 2, 2)`` between patches of different regions, as x and y in pixels.

    Args:
        regions: ``(h, w)`` integers; with ``closed`` the surroundings are region 0.
        patch: height and width of a patch.
        closed: draw along the border of the grid too.
    """
    wide = np.pad(regions, 1, constant_values=0) if closed else np.pad(regions, 1, mode="edge")
    rows, columns = np.nonzero(wide[1:, 1:-1] != wide[:-1, 1:-1])
    across = [((x, y), (x + 1, y)) for y, x in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(wide[1:-1, 1:] != wide[1:-1, :-1])
    down = [((x, y), (x, y + 1)) for y, x in zip(rows, columns, strict=True)]
    return np.array(across + down, dtype=float).reshape(-1, 2, 2) * (patch[1], patch[0])


def draw_query(axes: Axes, place: tuple[int, int], patch: tuple[float, float]) -> None:
    """Draw a square around the query's patch, large enough to be seen."""
    from matplotlib.patches import Rectangle

    low, high = axes.get_xlim()
    height, width = (max(side, _LEAST * abs(high - low)) for side in patch)
    corner = ((place[1] + 0.5) * patch[1] - width / 2, (place[0] + 0.5) * patch[0] - height / 2)
    for colour, linewidth in (("white", 3.4), (QUERY, 2.0)):
        mark = Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=linewidth, zorder=5)
        axes.add_patch(mark)


def draw_bar(bar: Axes, drawn: AxesImage, unit: str) -> None:
    """Draw the colour scale with the values of its ends, and the unit between them."""
    bar.imshow(np.linspace(0, 1, 256)[None], cmap=SCALE, aspect="auto")
    bar.set_axis_off()
    options = {"transform": bar.transAxes, "fontsize": 7.5, "color": QUIET, "va": "top"}
    for x, text, side in zip((0.0, 0.5, 1.0), _ends(*drawn.get_clim(), unit), ("left", "center", "right"), strict=True):
        bar.text(x, -0.55, plain(text), ha=side, **options)


def draw_classes(figure: Figure, panel: Panel, corner: tuple[float, float]) -> None:
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    x, y = corner
    for name, colour in zip(panel.classes, CLASSES, strict=False):
        y -= LINE
        figure.add_artist(Rectangle((x / width, (y + 0.03) / height), 0.12 / width, 0.09 / height, facecolor=colour))
        figure.text((x + 0.17) / width, (y + 0.03) / height, plain(name), fontsize=7.5, color=QUIET)


def _class_colours(panel: Panel) -> ListedColormap:
    from matplotlib.colors import ListedColormap

    return ListedColormap(CLASSES[: len(panel.classes)])


def cell(sheet: Sheet) -> tuple[float, float]:
    """Return height and width of a patch in pixels; a last patch may stick out of the picture."""
    height, width = (
        side / count if side % count == 0 else 2.0 ** round(math.log2(side / count))
        for side, count in zip((sheet.picture.height, sheet.picture.width), sheet.grid, strict=True)
    )
    return height, width


def _ends(low: float, high: float, unit: str) -> tuple[str, str, str]:
    """Return the texts under a colour scale: the unit stands between its ends."""
    first, last = (f"{end:#.3g}".rstrip(".") for end in (low, high))
    return first, unit, last


def rendered(figure: Figure) -> Image.Image:
    """Return the figure in few colours: some of its own, and those of the scale."""
    from matplotlib import colormaps

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    picture = Image.open(buffer).convert("RGB")
    scale = (colormaps[SCALE](np.linspace(0, 1, _COLOURS // 6))[:, :3] * 255).round().astype(np.uint8)
    few = picture.quantize(_COLOURS - len(scale), kmeans=1, dither=Image.Dither.NONE).getpalette() or []
    own = np.array(few, dtype=np.uint8).reshape(-1, 3)
    own[own.min(axis=1) >= _WHITE] = 255  # paper is white, not nearly so
    palette = Image.new("P", (1, 1))
    palette.putpalette([*own.flatten().tolist(), *scale.flatten().tolist()])
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)
