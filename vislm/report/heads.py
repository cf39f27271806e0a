"""Pictures of what a head method did: the factor of every head, beside the divergence it was chosen by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from vislm.errors import UsageError
from vislm.lmm.run import Run
from vislm.report.png import INK, QUIET, new_figure, plain, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

_CELL = 0.42
_MAX_LABELLED = 16
"""Cells carry their value in maps with at most this many heads."""


def head_figure(run: Run, text_config: Any, out: Path, title: str = "", *, sample: int = 0) -> Path:
    """Draw the layer x head map of the factors, beside the divergence if the run holds one; write a PNG.

    Args:
        run: a run under a head method: ``head_factors`` (layer -> (B, H)), and "vhd" in a method's memory.
        text_config: the language model's configuration (numbers of layers and heads).
        out: PNG file to write; its path is returned.
        title: headline, e.g. the method with its options.
        sample: row of the batch to draw.

    Raises:
        UsageError: a run without head factors or without that sample.
    """
    if not run.head_factors:
        raise UsageError("this run scaled no heads; run it under a head method, e.g. vhr:alpha=2")
    if not 0 <= sample < run.batch:
        raise UsageError(f"sample {sample}: the run has {run.batch} samples")
    shape = text_config.num_hidden_layers, text_config.num_attention_heads
    divergence = next((memory["vhd"] for memory in run.memory.values() if "vhd" in memory), None)
    maps = [_factor_map(_layer_head(run.head_factors, shape, sample))]
    divergence = next((memory["vhd"] for memory in run.memory.values() if "vhd" in memory), None)
    if divergence is not None:
        maps.insert(0, _divergence_map(_layer_head(divergence, shape, sample)))
    return save_figure(_figure(maps, shape, title), Path(out))


@dataclass(frozen=True)
class _Map:
    name: str
    values: np.ndarray
    """(L, H), NaN where there is none."""
    palette: Colormap
    norm: Normalize


def _factor_map(values: np.ndarray) -> _Map:
    """Colour factors around 1, which is white: unchanged."""
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    reach = max(float(np.nanmax(np.abs(values - 1.0))), 0.1)
    return _Map("factor on the head's output", values, colormaps["RdBu_r"], TwoSlopeNorm(1.0, 1.0 - reach, 1.0 + reach))


def _divergence_map(values: np.ndarray) -> _Map:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    top = max(float(np.nanmax(values)), 1e-9)
    return _Map("divergence with and without the image", values, colormaps["viridis"], Normalize(0.0, top))


def _layer_head(values: Mapping[int, Tensor], shape: tuple[int, int], sample: int) -> np.ndarray:
    """Return (L, H) with NaN in layers that the method did not look at."""
    full = np.full(shape, np.nan)
    for layer, row in values.items():
        full[layer] = row[sample].float().cpu().numpy()
    return full


def _figure(maps: list[_Map], shape: tuple[int, int], title: str) -> Figure:
    layers, heads = shape
    cell = max(0.12, min(_CELL, 5.0 / max(heads, layers / 1.5)))
    side, tall = max(heads * cell, 2.4), max(layers * cell, 1.4)
    left, gap, bottom, head = 0.75, 1.75, 0.65, 0.85 if title else 0.45
    width = left + len(maps) * side + (len(maps) - 1) * gap + 1.1
    height = bottom + tall + head
    figure = new_figure(width, height)
    if title:
        figure.text(0.2 / width, 1 - 0.18 / height, plain(title), fontsize=12, weight="bold", color=INK, va="top")
    for number, entry in enumerate(maps):
        x = left + number * (side + gap)
        axes = figure.add_axes((x / width, bottom / height, side / width, tall / height))
        bar = figure.add_axes(((x + side + 0.12) / width, bottom / height, 0.12 / width, tall / height))
        _draw(figure, axes, bar, entry)
    return figure


def _draw(figure: Figure, axes: Axes, bar: Axes, entry: _Map) -> None:
    drawn = axes.imshow(entry.values, cmap=entry.palette, norm=entry.norm, aspect="auto")
    axes.set_facecolor("#eceff2")  # shows through where there is no value
    axes.set_title(entry.name, fontsize=9, color=INK, loc="left")
    axes.set_xlabel("head", fontsize=8.5, color=QUIET)
    axes.set_ylabel("decoder layer", fontsize=8.5, color=QUIET)
    layers, heads = entry.values.shape
    axes.set_xticks(range(0, heads, max(1, heads // 16)))
    axes.set_yticks(range(0, layers, max(1, layers // 16)))
    axes.set_xticks(np.arange(-0.5, heads), minor=True)
    axes.set_yticks(np.arange(-0.5, layers), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(labelsize=8, colors=QUIET, length=0)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    if heads <= _MAX_LABELLED:
        _write_values(axes, entry)
    colour_bar = figure.colorbar(drawn, cax=bar)
    colour_bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.tick_params(labelsize=8, colors=QUIET, length=2)


def _write_values(axes: Axes, entry: _Map) -> None:
    for (layer, head), value in np.ndenumerate(entry.values):
        if np.isnan(value):
            axes.text(head, layer, "-", ha="center", va="center", fontsize=8, color=QUIET)
            continue
        red, green, blue, _ = entry.palette(entry.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        axes.text(head, layer, f"{value:.3g}", ha="center", va="center", fontsize=8, color="white" if dark else INK)
