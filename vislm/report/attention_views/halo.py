"""Halo attention: the keys of the query's block and of the halo around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vislm.report.attention_views.panel import Layer, Panel, tiles
from vislm.report.attention_views.rows import Row, head_panels, on_grid, query_weights


def halo_row(layer: Layer, place: tuple[int, int]) -> Row:
    """Return the weights of a patch in ``halo`` attention; with a stride, of the query that stands for it."""
    attention, prefix, (height, width) = layer.attention, layer.num_prefix, layer.grid
    query, key, _, options = attention.operands(layer.x, layer.grid)
    pattern = options["pattern"]
    row, column = (position // attention.query_stride for position in place)
    weights = query_weights(query, key, prefix + row * pattern.query_grid[1] + column, **options)
    whole = on_grid(weights, pattern.grid).weights
    inside = np.where(np.isfinite(whole), whole, np.nan)[:, :height, :width]
    return Row(inside, 1 - np.nansum(inside, axis=(1, 2)))


def halo_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``halo`` attention."""
    attention, row = layer.attention, halo_row(layer, place)
    seen = np.isfinite(row.weights[0])
    regions = tiles(layer.grid, (attention.block_size,) * 2)
    note = f"blocks of {attention.block_size} x {attention.block_size}; a halo of {attention.halo_size} is framed"
    if attention.query_stride > 1:
        note += f"; a query for every {attention.query_stride} x {attention.query_stride} patches"
    return [
        Panel("what the model sees", note, regions=regions, frame=seen),
        *head_panels(row, heads, frame=seen, regions=np.where(seen, regions, regions.max() + 1)),
    ]
