"""Time and peak memory over the number of tokens, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vislm.bench.kernels.peers import EAGER, FLEX, GATHER, HALO, NATTEN, SDPA
from vislm.bench.kernels.rows import Row
from vislm.report.png import INK, QUIET, new_figure, plain, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers tell apart; a marker each besides
_PEERS = {
    SDPA: ("#0072b2", "s"),
    FLEX: ("#009e73", "^"),
    GATHER: ("#cc79a7", "v"),
    EAGER: ("#56b4e9", "D"),
    NATTEN: ("#e69f00", "P"),
    HALO: ("#000000", "X"),
}
_OURS = ("#d55e00", "#7a3500", "#f0a070", "#a04000")
_PANELS: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
    ("forward, ms", lambda row: row.seconds * 1e3 if row.direction == "forward" else None),
    ("forward + backward, ms", lambda row: row.seconds * 1e3 if row.direction == "training" else None),
    ("peak memory forward, MiB", lambda row: row.peak / 2**20 if row.peak and row.direction == "forward" else None),
)


def plot_rows(rows: Sequence[Row], out: Path) -> Path:
    """Draw the rows of one pattern, leaving out what was not measured, and write them as PNG; return its path."""
    names = list(dict.fromkeys(row.case for row in rows))
    styles = _styles(rows, names)
    panels = [(label, value) for label, value in _PANELS if any(value(row) is not None for row in rows)]
    width, height = 0.3 + 3.7 * len(panels), 4.2
    figure = new_figure(width, height)
    for number, (label, value) in enumerate(panels):
        axes = figure.add_axes(((0.6 + 3.7 * number) / width, 0.95 / height, 3.05 / width, 2.6 / height))
        for name in names:
            points = [(row.tokens, y) for row in rows if row.case == name and (y := value(row)) is not None]
            colour, marker, thickness = styles[name]
            tokens, values = [x for x, _ in points], [y for _, y in points]
            axes.plot(tokens, values, color=colour, marker=marker, linewidth=thickness, markersize=5, label=plain(name))
        _style(axes, label, sorted({(row.tokens, "x".join(map(str, row.grid))) for row in rows}))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(4 if len(panels) > 1 else 2, len(names))
    figure.legend(handles, labels, loc="lower center", ncol=columns, fontsize=8, frameon=False, labelcolor=INK)
    figure.text(0.6 / width, 1 - 0.1 / height, plain(rows[0].pattern), fontsize=11, weight="bold", color=INK, va="top")
    return save_figure(figure, out)


def _styles(rows: Sequence[Row], names: Sequence[str]) -> dict[str, tuple[str, str, float]]:
    ours = {row.case for row in rows if row.against is None}
    numbered = [name for name in names if name in ours]
    return {
        name: (_OURS[numbered.index(name) % len(_OURS)], "o", 2.4) if name in ours else (*_PEERS[name], 1.5)
        for name in names
    }


def _style(axes: Axes, label: str, grids: Sequence[tuple[int, str]]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(label, fontsize=9, color=INK, loc="left")
    axes.set_xticks([tokens for tokens, _ in grids], [name for _, name in grids])
    axes.set_xticks([], minor=True)
    axes.tick_params(which="both", labelsize=8, colors=QUIET, length=2)
    axes.grid(color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4ccd4")
    axes.set_xlabel("tokens", fontsize=8.5, color=QUIET)
