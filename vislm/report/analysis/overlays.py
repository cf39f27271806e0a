"""Attention over the picture: one small map per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vislm.analysis.results import Analysis
from vislm.report.panels import Panel, panel_figure

_SIDE = 240
_PER_ROW = 6


@dataclass(frozen=True)
class TokenGrid:
    """Where tokens lie on the picture."""

    rows: int
    columns: int
    start: int = 0
    row_stride: int = 0
    """Tokens from one row to the next; 0: as many as columns."""

    def index(self) -> np.ndarray:
        """Return (rows, columns): the token of each cell."""
        stride = self.row_stride or self.columns
        return self.start + np.arange(self.rows)[:, None] * stride + np.arange(self.columns)


def token_grid(analysis: Analysis, layer: int = 0) -> TokenGrid | None:
    """Return the grid of an analysis: of an LMM the image's first rectangle, of a ViT that of a layer."""
    grids = analysis.header.get("grids") or []
    if not grids:
        return None
    if analysis.header["kind"] == "lmm":
        return TokenGrid(**grids[0])
    return TokenGrid(*grids[layer])


def heat_overlay(picture: Image.Image, values: np.ndarray, side: int = _SIDE) -> Image.Image:
    """Return the picture, grey and dim, with values (rows, columns) as colour over it, the largest strongest."""
    from matplotlib import colormaps

    rows, columns = values.shape
    cell = max(4, round(side / max(rows, columns)))
    size = (columns * cell, rows * cell)
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)[..., None]
    finite = np.nan_to_num(values.astype(np.float64))
    strength = finite / max(float(finite.max()), 1e-12)
    strength = strength.clip(0.0, 1.0).repeat(cell, 0).repeat(cell, 1)
    colour = colormaps["inferno"](0.25 + 0.75 * strength)[..., :3] * 255.0
    weight = (0.85 * strength**0.6)[..., None]
    mixed = (0.75 * grey + 30.0) * (1.0 - weight) + colour * weight
    return Image.fromarray(mixed.clip(0, 255).round().astype(np.uint8))


def overlay_sheet(analysis: Analysis, picture: Image.Image, out: Path) -> Path | None:
    """Draw where each layer looks, mean over its heads; write a PNG and return its path, None without any map.

    Of an LMM: the last prompt row, what the image's tokens receive, and the rollout. Of a ViT: the class token's row
    (or what patches receive) and the rollout.
    """
    panels = _lmm_panels(analysis, picture) if analysis.header["kind"] == "lmm" else _vit_panels(analysis, picture)
    if not panels:
        return None
    rows = [panels[n : n + _PER_ROW] for n in range(0, len(panels), _PER_ROW)]
    return panel_figure(rows, Path(out), side=1.6)


def _lmm_panels(analysis: Analysis, picture: Image.Image) -> list[Panel]:
    grid, tensors = token_grid(analysis), analysis.tensors
    if grid is None:
        return []
    cells = grid.index()
    panels: list[Panel] = []
    if "maps.image_rows" in tensors:
        rows = tensors["maps.image_rows"][0].float().numpy()
        panels += [
            _panel(picture, mean[cells], f"layer {layer}", f"last row: {mean.sum():.0%} on it")
            for layer, mean in enumerate(rows.mean(1))
        ]
    if "sinks.received_image" in tensors:
        received = tensors["sinks.received_image"].float().numpy().mean(1)
        panels += [_panel(picture, row[cells], f"layer {n}", "received, all rows") for n, row in enumerate(received)]
    panels += [
        _panel(picture, tensors[name].float().numpy()[cells], "rollout", note)
        for name, note in (("rollout.map", "last prompt row"), ("rollout.relative", "over position alone"))
        if name in tensors
    ]
    return panels


def _vit_panels(analysis: Analysis, picture: Image.Image) -> list[Panel]:
    tensors, panels = analysis.tensors, list[Panel]()
    rows, note = class_rows(analysis), "class token, mean of heads"
    if rows is None and "sinks.received" in tensors:
        rows, note = tensors["sinks.received"].float().numpy(), "received by patches"
    for layer, own in enumerate(() if rows is None else rows):
        grid, prefix = token_grid(analysis, layer), analysis.header["prefix"][layer]
        assert grid is not None
        heads, patches = analysis.header["heads"][layer], slice(prefix, prefix + grid.rows * grid.columns)
        mean = own[:heads, patches].mean(0)
        panels.append(_panel(picture, mean.reshape(grid.rows, grid.columns), f"layer {layer}", note))
    if "rollout.map" in tensors:
        panels.append(_panel(picture, tensors["rollout.map"].float().numpy(), "rollout", "all layers"))
    return panels


def class_rows(analysis: Analysis) -> np.ndarray | None:
    """Return (L, H, P + N): the first prefix token's rows on all tokens; None where none were kept."""
    if not analysis.header["prefix"][0]:
        return None
    for name in ("maps.full", "maps.prefix_rows"):
        if name in analysis.tensors:
            return analysis.tensors[name][:, :, 0].float().numpy()
    return None


def _panel(picture: Image.Image, values: np.ndarray, title: str, note: str) -> Panel:
    return Panel(heat_overlay(picture, values), title, note)


def cluster_panels(analysis: Analysis, prefix: str = "patterns") -> Sequence[tuple[str, np.ndarray]]:
    """Return per cluster its name and the mean attention between patches at a relative position (2h - 1, 2w - 1)."""
    if f"{prefix}.cluster" not in analysis.tensors or "distance.offsets" not in analysis.tensors:
        return []
    labels = analysis.tensors[f"{prefix}.cluster"].numpy()
    offsets = analysis.tensors["distance.offsets"].float().numpy()
    rows, columns = (np.minimum(np.arange(1, side + 1), np.arange(side, 0, -1)) for side in offsets.shape[-2:])
    offsets = offsets * (rows.max() * columns.max() / (rows[:, None] * columns))  # from sums over pairs to their mean
    names = analysis.header[prefix]["clusters"]
    return [(f"{number}: {name}", offsets[labels == number].mean(0)) for number, name in enumerate(names)]
