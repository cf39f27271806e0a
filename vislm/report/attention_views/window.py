"""Window attention: the query's window, plain or shifted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vislm.attention.window import padded
from vislm.kernels import RelativeBias
from vislm.report.attention_views.panel import Layer, Panel, array, tiles
from vislm.report.attention_views.rows import Row, head_panels, on_grid, prefix_logits, projected, query_weights


def window_row(layer: Layer, place: tuple[int, int]) -> Row:
    """Return the weights of a patch in ``window`` attention."""
    attention, table = layer.attention, layer.attention.relative_position_bias_table
    pattern = attention.pattern(layer.grid)
    query, key = projected(layer, padded(layer.x, layer.grid, pattern))
    # Where each token came to lie on the padded grid, from 1; 0 is padding.
    numbers = torch.arange(1, layer.x.shape[1] + 1, dtype=torch.float64)[None, :, None]
    source = array(padded(numbers, layer.grid, pattern))[0, :, 0].astype(int)
    logits = prefix_logits(attention, key.shape[2])
    weights = query_weights(
        query,
        key,
        int(np.flatnonzero(source == layer.token(place) + 1)[0]),
        pattern,
        bias=None if table is None else RelativeBias.swin(table, attention.window_size),
        scale=attention.scale,
        key_logits=logits,
    )
    at_tokens = weights[:, np.argsort(source, kind="stable")[(source == 0).sum() :]]
    row = on_grid(at_tokens, layer.grid)
    return Row(row.weights, row.beside + np.nansum(weights[:, source == 0], axis=1))


def window_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``window`` attention."""
    row, pattern = window_row(layer, place), layer.attention.pattern(layer.grid)
    seen = np.isfinite(row.weights[0])
    regions = tiles(layer.grid, pattern.window, pattern.shift)
    kind = "windows shifted by" if any(pattern.shift) else "windows of"
    size = pattern.shift if any(pattern.shift) else pattern.window
    note = f"{kind} {' x '.join(map(str, size))} patches; the query's is framed"
    return [
        Panel("what the model sees", note, regions=regions, frame=seen),
        *head_panels(row, heads, frame=seen),
    ]
