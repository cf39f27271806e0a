"""Cross-shaped windows: a vertical stripe for half of the heads, a horizontal one for the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vislm.attention.stripes import branch_stripes
from vislm.attention.tokens import split_heads
from vislm.kernels import Window
from vislm.report.attention_views.panel import Layer, Panel, tiles
from vislm.report.attention_views.rows import Row, head_panels, on_grid, query_weights


def stripe_rows(layer: Layer, place: tuple[int, int]) -> list[Row]:
    """Return the weights of a patch in ``cswin`` attention, for each branch of heads: vertical and horizontal."""
    attention, rows = layer.attention, list[Row]()
    branches, heads = len(attention.attns), attention.num_heads // len(attention.attns)
    query, key, _ = attention.qkv(layer.x).chunk(3, dim=-1)
    for index, (part_q, part_k) in enumerate(zip(query.chunk(branches, -1), key.chunk(branches, -1), strict=True)):
        size = branch_stripes(layer.grid, attention.split_size, index).size
        weights = query_weights(
            split_heads(part_q, heads),
            split_heads(part_k, heads),
            layer.token(place),
            Window(layer.grid, size, prefix=layer.num_prefix),
            scale=attention.scale,
        )
        rows.append(on_grid(weights, layer.grid))
    return rows


def stripe_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``cswin`` attention."""
    rows, attention = stripe_rows(layer, place), layer.attention
    if heads:
        every = Row(np.concatenate([r.weights for r in rows]), np.concatenate([r.beside for r in rows]))
        return [Panel("what the model sees"), *head_panels(every, heads)]
    panels = list[Panel]()
    for index, row in enumerate(rows):
        (panel, *_), seen = head_panels(row, ()), np.isfinite(row.weights[0])
        size = branch_stripes(layer.grid, attention.split_size, index).size
        title = "the whole map" if len(rows) == 1 else ("vertical stripes", "horizontal stripes")[index]
        note = f"mean of {len(row.weights)} heads; stripes of {size[0]} x {size[1]} patches"
        panels.append(Panel(title, note, panel.values, panel.unit, regions=tiles(layer.grid, size), frame=seen))
    cross = np.logical_or.reduce([np.isfinite(row.weights[0]) for row in rows])
    return [Panel("what the model sees", "the query's cross is framed", frame=cross), *panels]
