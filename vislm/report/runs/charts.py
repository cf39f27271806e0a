"""Plots of a bundle of runs, as SVG: score against cost, calibration of yes and no, bars per part and per group."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vislm.eval.compare import RunRecord
from vislm.report.png import ACCENT, INK, QUIET, new_figure, plain
from vislm.report.runs.bundle import Bundle
from vislm.report.runs.calibration import bins, expected_error
from vislm.report.runs.scores import Scores
from vislm.report.runs.tables import number, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2f6db5", ACCENT, "#2a9d6f", "#8b5fbf", "#b8860b", "#8a949e", "#c2417c", "#3aa6b9")
_MOST_RUNS = len(COLOURS)
_MOST_GROUPS = 24
_COSTS = (("visual_tokens_kept", "visual tokens left", 1.0), ("flops", "GFLOP", 1e-9), ("milliseconds", "ms", 1.0))


@dataclass(frozen=True)
class Chart:
    """A plot, and what it shows in words."""

    svg: str
    caption: str
    wide: bool = False
    """Whether it needs the whole width of a page."""

    @property
    def data_uri(self) -> str:
        """The plot as a data URI; inside an ``img`` nothing of it can run."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode('utf-8')).decode('ascii')}"


def charts(bundle: Bundle, scores: Scores) -> list[Chart]:
    """Return every plot that these runs have the numbers for."""
    drawn = [cost_chart(bundle, scores), calibration_chart(bundle), part_chart(bundle, scores), group_chart(bundle)]
    return [chart for chart in drawn if chart is not None]


def cost_chart(bundle: Bundle, scores: Scores) -> Chart | None:
    """Draw the first figure with its 95 % interval over tokens, FLOPs and time; None without runs that differ."""
    figure = bundle.runs[0].figures[0]
    intervals = [found.get(figure.name) for found in scores.intervals]
    costs = [(name, [_scaled(run, key, scale) for run in bundle.runs]) for key, name, scale in _COSTS]
    costs = [(name, x) for name, x in costs if all(v is not None for v in x) and len(set(x)) > 1]
    if len(bundle.runs) < 2 or not costs or any(i is None for i in intervals):
        return None
    families = [_family(run) for run in bundle.runs]
    names = list(dict.fromkeys(families))
    drawing, panels = _panels(len(costs), 3.0)
    for axes, (name, x) in zip(panels, costs, strict=True):
        for place, family in enumerate(names):
            points = sorted(
                (x[n] or 0.0, i.value, i.value - i.low, i.high - i.value)
                for n, i in enumerate(intervals)
                if families[n] == family and i is not None
            )
            values = list(zip(*points, strict=True))
            colour = COLOURS[place % len(COLOURS)]
            axes.errorbar(values[0], values[1], yerr=values[2:], color=colour, marker="o", markersize=4.5, capsize=2.5)
            axes.lines[-1].set_label(_text(family, 40))
        axes.set_xlabel(name, fontsize=8.5, color=QUIET)
        axes.set_ylabel(_text(figure.name, 30), fontsize=8.5, color=QUIET)
    _legend(drawing, [_text(n, 40) for n in names])
    caption = f"{figure.name} with its 95 % interval against what a sample cost: " + ", ".join(n for n, _ in costs)
    return Chart(_svg(drawing), f"{caption}.", len(costs) > 1)


def calibration_chart(bundle: Bundle) -> Chart | None:
    """Draw how often yes is right by how likely the model found it; None where rows have no margin."""
    found = [(label, bins(run.rows)) for label, run in zip(bundle.labels, bundle.runs, strict=True)][:_MOST_RUNS]
    found = [(label, b) for label, b in found if b]
    if not found:
        return None
    drawing, (left, right) = _panels(2, 3.3)
    left.plot([0, 1], [0, 1], color="#c4ccd4", linewidth=1, linestyle="--")
    names = []
    for place, (label, b) in enumerate(found):
        colour = COLOURS[place]
        left.plot([x.predicted for x in b], [x.observed for x in b], color=colour, marker="o", markersize=4)
        offset = (place - (len(found) - 1) / 2) * 0.08 / len(found)
        centres = [(x.low + x.high) / 2 + offset for x in b]
        right.bar(centres, [x.n for x in b], width=0.08 / len(found), color=colour)
        names.append(_text(f"{short(label, 34)}: {expected_error(b):.3f}"))
    for axes, text in ((left, "share of pictures where yes is right"), (right, "samples")):
        axes.set_xlabel("probability of yes, against no", fontsize=8.5, color=QUIET)
        axes.set_ylabel(text, fontsize=8.5, color=QUIET)
        axes.set_xlim(-0.03, 1.03)
    left.set_ylim(-0.03, 1.03)
    _legend(drawing, names)
    caption = (
        "Calibration of the yes-no margin: on the diagonal the model is as sure as it is right. The number beside "
    )
    return Chart(_svg(drawing), f"{caption}each run is its expected calibration error (ten bins).", True)


def part_chart(bundle: Bundle, scores: Scores) -> Chart | None:
    """Draw the first figure of every split or sub-task with standard errors; None where there is only one."""
    parts = bundle.runs[0].parts[:_MOST_GROUPS]
    if len(parts) < 2:
        return None
    figure = bundle.runs[0].figures[0]
    rows = []
    for comparisons in scores.own[:_MOST_RUNS]:
        first = {c.part: c for c in comparisons if c.figure.name == figure.name}
        rows.append([(first[p].a, first[p].a_error) if p in first else (math.nan, math.nan) for p in parts])
    drawn = _bars(parts, rows, bundle.labels, figure.name)
    return Chart(drawn, f"{figure.name} of each part, with its standard error.")


def group_chart(bundle: Bundle) -> Chart | None:
    """Draw the first metric of the largest groups (objects, categories, ...); None where there are none."""
    groups = [_groups(run) for run in bundle.runs[:_MOST_RUNS]]
    metric = next((name for group in groups[0].values() for name in group if name not in ("n", "count")), None)
    most = _MOST_GROUPS if len(groups) <= 3 else _MOST_GROUPS // 2
    largest = sorted(groups[0], key=lambda g: -groups[0][g].get("n", 0))[:most]
    if metric is None or len(largest) < 2:
        return None
    names = sorted(largest)
    rows = [[(group.get(name, {}).get(metric, math.nan), math.nan) for name in names] for group in groups]
    which = "all groups" if len(groups[0]) <= most else f"the {len(names)} largest of {len(groups[0])} groups"
    return Chart(_bars(names, rows, bundle.labels, metric), f"{metric} of {which}.")


def _groups(run: RunRecord) -> dict[str, dict[str, float]]:
    found = run.results.get("per_group")
    if not isinstance(found, Mapping):
        return {}
    groups = {str(name): _numbers(values) for name, values in found.items() if isinstance(values, Mapping)}
    return {name: values for name, values in groups.items() if values}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(k): float(v) for k, v in values.items() if type(v) in (int, float) and abs(v) < 1e15}


def _scaled(run: RunRecord, key: str, scale: float) -> float | None:
    value = number(run.results, key)
    return None if value is None else value * scale


def _family(run: RunRecord) -> str:
    """Return the names of a run's methods without their options: runs of one family are joined by a line."""
    methods = run.config.get("interventions")
    names = [str(m).partition("(")[0] for m in methods] if isinstance(methods, list) else []
    return " + ".join(names) or "all tokens"


def _bars(
    names: Sequence[str], rows: Sequence[Sequence[tuple[float, float]]], labels: Sequence[str], title: str
) -> str:
    """Draw horizontal bars: a group per name, a bar per run."""
    step = max(0.24, 0.12 * len(rows) + 0.08)
    width, left, top = 5.6, 1.5, 0.1 + (0.19 * -(-len(rows) // 2) + 0.05 if len(rows) > 1 else 0.0)
    height = step * len(names) + 0.5 + top
    figure = new_figure(width, height)
    axes = figure.add_axes((left / width, 0.5 / height, (width - left - 0.2) / width, (height - 0.5 - top) / height))
    thick = 0.8 / len(rows)
    for n, row in enumerate(rows):
        places = [place + (n - (len(rows) - 1) / 2) * thick for place in range(len(names))]
        errors = [e if math.isfinite(e) else 0.0 for _, e in row]
        bars = {"xerr": errors, "error_kw": {"elinewidth": 0.8, "ecolor": INK}} if any(errors) else {}
        values = [v if math.isfinite(v) else 0.0 for v, _ in row]
        axes.barh(places, values, height=thick * 0.92, color=COLOURS[n % len(COLOURS)], **bars)
    axes.set_yticks(range(len(names)), [_text(n, 26) for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(_text(title, 40), fontsize=8.5, color=QUIET)
    _plain_axes(axes, "x")
    if len(rows) > 1:
        _legend(figure, [_text(label, 34) for label in labels[: len(rows)]], 2)
    return _svg(figure)


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    width, inner = 3.8 * count, height - 1.0
    figure = new_figure(width, height)
    panels = []
    for n in range(count):
        box = ((n * 3.8 + 0.65) / width, 0.52 / height, 2.95 / width, inner / height)
        panels.append(figure.add_axes(box))
        _plain_axes(panels[-1], "both")
    return figure, panels


def _plain_axes(axes: Axes, grid: str) -> None:
    axes.tick_params(labelsize=8, colors=QUIET, length=2)
    axes.grid(axis=grid, color="#e6eaee", linewidth=0.8)  # pyright: ignore[reportArgumentType]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4ccd4")


def _legend(figure: Figure, names: Sequence[str], columns: int = 3) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[n % len(COLOURS)], label=name) for n, name in enumerate(names)]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.02, 1.0),
        ncols=min(columns, len(handles)),
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        handlelength=1.0,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _text(text: str, length: int = 80) -> str:
    """Return a text that SVG can hold and matplotlib draws as it is, cut to a length."""
    return plain(short("".join(c if c.isprintable() else " " for c in text), length))


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with (
        warnings.catch_warnings(),
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "vislm", "font.family": "sans-serif"}),
    ):
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser has its own fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
