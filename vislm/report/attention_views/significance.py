"""SG-Former: local and coarse keys, and the significance that they give to each token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vislm.report.attention_views.panel import Layer, Panel, array, tiles
from vislm.report.attention_views.rows import Row, head_panels, on_grid, query_weights

MEAN = "x the mean"


def hybrid_rows(layer: Layer, place: tuple[int, int]) -> tuple[Row, Row]:
    """Return the weights of a patch in ``hybrid_scale`` attention: of the heads with coarse keys, and with local ones.

    A patch has the weight of the coarse key that stands for it; those that are left over at the border have none.
    """
    attention, index = layer.attention, layer.token(place)
    coarse, local = (
        query_weights(scale.query, scale.key, index, scale.pattern, scale=attention.scale)
        for scale in attention.scales(layer.x, layer.grid)
    )
    ratio = attention.sr_ratio
    reduced = tuple(max(side, ratio) // ratio for side in layer.grid)
    keys, weights = on_grid(coarse, reduced), np.full((len(coarse), *layer.grid), np.nan)
    whole = keys.weights.repeat(ratio, axis=1).repeat(ratio, axis=2)[:, : layer.grid[0], : layer.grid[1]]
    weights[:, : whole.shape[1], : whole.shape[2]] = whole
    return Row(weights, keys.beside), on_grid(local, layer.grid)


def hybrid_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``hybrid_scale`` attention."""
    (coarse, local), attention = hybrid_rows(layer, place), layer.attention
    window = tiles(layer.grid, (attention.window_size,) * 2)
    cells, seen = tiles(layer.grid, (attention.sr_ratio,) * 2), np.isfinite(local.weights[0])
    significance = array(attention(layer.x, layer.grid, significance=True)[1][0]).reshape(layer.grid)
    rated = Panel("significance", "attention that a patch receives", significance / significance.mean(), MEAN)
    panels = [
        Panel(
            "what the model sees",
            f"windows of {attention.window_size} x {attention.window_size}; the query's is framed",
            regions=window,
            frame=seen,
        )
    ]
    if heads:
        every = Row(np.concatenate([coarse.weights, local.weights]), np.concatenate([coarse.beside, local.beside]))
        return [*panels, *head_panels(every, heads), rated]
    for row, title, note, lines in (
        (local, "local keys", f"mean of {len(local.weights)} heads, in the window", window),
        (
            coarse,
            "coarse keys",
            f"mean of {len(coarse.weights)} heads, cells of {attention.sr_ratio} x {attention.sr_ratio}",
            cells,
        ),
    ):
        (mean, *_) = head_panels(row, ())
        panels.append(Panel(title, note, mean.values, mean.unit, regions=lines))
    return [*panels, rated]
