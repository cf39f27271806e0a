"""The pattern of each cluster of heads."""

from __future__ import annotations

from pathlib import Path

from vislm.analysis.results import Analysis
from vislm.errors import UsageError
from vislm.report.analysis.heatmaps import CLUSTERS
from vislm.report.analysis.overlays import cluster_panels
from vislm.report.png import INK, new_figure, plain, save_figure

_SIDE, _PER_ROW = 1.45, 6


def cluster_figure(analysis: Analysis, out: Path) -> Path:
    """Draw each cluster's mean attention by relative position; write a PNG and return its path.

    Raises:
        UsageError: an analysis without clusters or without attention by relative position.
    """
    panels = cluster_panels(analysis)
    if not panels:
        raise UsageError("the analysis holds no clusters with attention by relative position")
    height, width = panels[0][1].shape
    tall = _SIDE * min(2.0, max(0.4, height / width))
    columns = min(_PER_ROW, len(panels))
    rows = -(-len(panels) // columns)
    step = (_SIDE + 0.35, tall + 0.5)
    size = (columns * step[0] + 0.2, rows * step[1] + 0.1)
    figure = new_figure(*size)
    for number, (name, values) in enumerate(panels):
        x = 0.25 + (number % columns) * step[0]
        y = size[1] - (number // columns) * step[1] - 0.35 - tall
        axes = figure.add_axes((x / size[0], y / size[1], _SIDE / size[0], tall / size[1]))
        axes.imshow(values, cmap="magma", aspect="auto", interpolation="nearest", vmin=0)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.axhline(height // 2, color="white", linewidth=0.4, alpha=0.5)
        axes.axvline(width // 2, color="white", linewidth=0.4, alpha=0.5)
        for spine in axes.spines.values():
            spine.set_color(CLUSTERS[number % len(CLUSTERS)])
            spine.set_linewidth(2.5)
        axes.set_title(plain(name), fontsize=8, color=INK, loc="left")
    return save_figure(figure, Path(out))
