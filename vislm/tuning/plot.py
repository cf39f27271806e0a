"""Discrepancy over FLOPs of all trials, and the front that no trial beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vislm.report.png import ACCENT, INK, QUIET, new_figure, plain, save_figure
from vislm.tuning.study import Result, Tried

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers tell apart; a marker each besides
_STYLES = (("#0072b2", "o"), ("#009e73", "^"), ("#cc79a7", "s"), ("#e69f00", "D"), ("#56b4e9", "P"), ("#000000", "v"))
Point = tuple[float, float]
"""(share of the FLOPs, discrepancy)."""


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both coordinates (smaller is better), by the first coordinate."""
    front: list[Point] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def pareto_figure(results: Sequence[Result], out: Path, title: str = "") -> Path:
    """Draw every budget's trials, defaults and best trial, and the front over all of them; return the picture's path.

    Trials over their budget are hollow. The discrepancy's axis is logarithmic.
    """
    width, height = 6.4, 4.4
    figure = new_figure(width, height)
    axes = figure.add_axes((0.78 / width, 0.62 / height, 5.4 / width, 3.3 / height))
    for number, result in enumerate(results):
        _draw(axes, result, *_STYLES[number % len(_STYLES)])
    ran = [_point(t) for r in results for t in [r.defaults, *r.trials] if t.evaluation]
    front = pareto_front(ran)
    axes.plot([x for x, _ in front], [y for _, y in front], color=INK, linewidth=1.0, zorder=1, label="Pareto front")
    _style(axes, title)
    return save_figure(figure, out)


def _point(tried: Tried) -> Point:
    assert tried.evaluation is not None
    # a method that changes nothing at all must still have a place on a logarithmic axis
    return tried.evaluation.cost.flops, max(tried.evaluation.discrepancy, 1e-7)


def _draw(axes: Axes, result: Result, colour: str, marker: str) -> None:
    for feasible, face in ((True, colour), (False, "none")):
        points = [_point(t) for t in result.trials if t.evaluation and t.feasible == feasible]
        label = f"{result.budget}{'' if feasible else ', over it'}"
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=24, marker=marker, facecolors=face, edgecolors=colour, alpha=0.75, label=label)
    if result.defaults.evaluation:
        x, y = _point(result.defaults)
        axes.scatter([x], [y], s=70, marker="x", color=colour, linewidths=2.0, label=f"{result.budget}, defaults")
    if result.best:
        x, y = _point(result.best)
        axes.scatter([x], [y], s=150, marker="*", color=ACCENT, edgecolors=INK, linewidths=0.7, zorder=4)


def _style(axes: Axes, title: str) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("FLOPs of tower and prefill, share of the full model's", fontsize=8.5, color=QUIET)
    axes.set_ylabel("discrepancy of the last hidden state", fontsize=8.5, color=QUIET)
    axes.set_title(plain(f"{title}  (star: the schedule)"), fontsize=9, color=INK, loc="left")
    axes.tick_params(which="both", labelsize=8, colors=QUIET, length=2)
    axes.grid(color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4ccd4")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
