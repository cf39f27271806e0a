"""Attention to all tokens: softmax, with SG-Former's position encoding, or with sigmoid weights."""

from __future__ import annotations

from collections.abc import Sequence

from vislm.attention.tokens import split_heads
from vislm.kernels import StatisticsRequest
from vislm.report.attention_views.panel import Layer, Panel, array
from vislm.report.attention_views.rows import Row, head_panels, on_grid, projected, query_weights

SEEN = Panel("what the model sees", "every patch attends to all")


def dense_row(layer: Layer, place: tuple[int, int]) -> Row:
    """Return the weights of a patch in ``dense`` attention."""
    query, key = projected(layer)
    return on_grid(query_weights(query, key, layer.token(place), scale=layer.attention.scale), layer.grid)


def lepe_row(layer: Layer, place: tuple[int, int]) -> Row:
    """Return the weights of a patch in ``lepe`` attention."""
    attention = layer.attention
    query = split_heads(attention.q(layer.x), attention.num_heads)
    key = split_heads(attention.kv(layer.x).chunk(2, dim=-1)[0], attention.num_heads)
    return on_grid(query_weights(query, key, layer.token(place), scale=attention.scale), layer.grid)


def sigmoid_row(layer: Layer, place: tuple[int, int]) -> Row:
    """Return the weights of a patch in ``sigmoid`` attention; they do not sum to one."""
    request = StatisticsRequest(rows=(layer.token(place),))
    rows = layer.attention(layer.x, layer.grid, statistics=request).statistics.rows
    return on_grid(array(rows[0, :, 0]), layer.grid)


def dense_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``dense`` attention."""
    return [SEEN, *head_panels(dense_row(layer, place), heads)]


def lepe_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``lepe`` attention."""
    return [SEEN, *head_panels(lepe_row(layer, place), heads)]


def sigmoid_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``sigmoid`` attention."""
    return [SEEN, *head_panels(sigmoid_row(layer, place), heads)]
