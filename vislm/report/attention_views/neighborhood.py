"""Neighborhood attention: the window of keys around a query, with gaps where it is dilated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vislm.attention.tokens import pad_grid
from vislm.kernels import RelativeBias
from vislm.report.attention_views.panel import Layer, Panel
from vislm.report.attention_views.rows import Row, head_panels, on_grid, prefix_logits, projected, query_weights


def neighborhood_row(layer: Layer, place: tuple[int, int]) -> Row:
    """Return the weights of a patch in ``neighborhood`` attention."""
    attention, prefix = layer.attention, layer.num_prefix
    pattern = attention.pattern(layer.grid)
    query, key = projected(layer, pad_grid(layer.x, layer.grid, pattern.grid, prefix))
    logits = prefix_logits(attention, key.shape[2])
    weights = query_weights(
        query,
        key,
        prefix + place[0] * pattern.grid[1] + place[1],
        pattern,
        bias=None if attention.rpb is None else RelativeBias(attention.rpb),
        scale=attention.scale,
        key_logits=logits,
    )
    row, (height, width) = on_grid(weights, pattern.grid), layer.grid
    inside = row.weights[:, :height, :width]
    padding = np.nansum(row.weights, axis=(1, 2)) - np.nansum(inside, axis=(1, 2))
    return Row(inside, row.beside + padding)


def neighborhood_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``neighborhood`` attention."""
    row, pattern = neighborhood_row(layer, place), layer.attention.pattern(layer.grid)
    seen = np.isfinite(row.weights[0])
    window = " x ".join(map(str, pattern.window))
    dilated = "" if pattern.dilation == (1, 1) else f", every {pattern.dilation[0]}th patch"
    first = Panel("what the model sees", f"the query's neighborhood: {window} keys{dilated}", frame=seen)
    return [first, *head_panels(row, heads, frame=None if pattern.dilation != (1, 1) else seen)]
