"""Curves: what is left of a metric as a method spends less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vislm.errors import UsageError
from vislm.report.png import ACCENT, INK, QUIET, new_figure, plain, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#8a949e", "#2f6db5", ACCENT, "#2a9d6f", "#8b5fbf", "#b8860b")
_MARKERS = ("s", "^", "o", "D", "v", "P")


@dataclass(frozen=True)
class Curve:
    """One method: its points, in any order."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Curves over one quantity."""

    x_label: str
    y_label: str
    curves: Sequence[Curve]


def curve_figure(charts: Sequence[Chart], out: Path) -> Path:
    """Draw charts side by side and write them as PNG; return its path.

    A method has the same colour and marker in every chart, by its place among the curves.

    Raises:
        UsageError: nothing to draw, or a curve whose x and y differ in length.
    """
    if not charts or not all(chart.curves for chart in charts):
        raise UsageError("no curves to draw; give every chart at least one")
    for curve in (curve for chart in charts for curve in chart.curves):
        if len(curve.x) != len(curve.y) or not curve.x:
            raise UsageError(f"curve {curve.label!r} has {len(curve.x)} x and {len(curve.y)} y values")
    width, height = 4.6 * len(charts), 3.4
    figure = new_figure(width, height)
    for number, chart in enumerate(charts):
        left = number * 4.6 + 0.72
        _draw(figure.add_axes((left / width, 0.6 / height, 3.6 / width, 2.6 / height)), chart)
    return save_figure(figure, out)


def _draw(axes: Axes, chart: Chart) -> None:
    for number, curve in enumerate(chart.curves):
        points = sorted(zip(curve.x, curve.y, strict=True))
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=plain(curve.label),
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            linewidth=1.8,
        )
    axes.set_xlabel(plain(chart.x_label), fontsize=8.5, color=QUIET)
    axes.set_ylabel(plain(chart.y_label), fontsize=8.5, color=QUIET)
    axes.tick_params(labelsize=8, colors=QUIET, length=2)
    axes.grid(color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4ccd4")
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK, loc="lower right")
