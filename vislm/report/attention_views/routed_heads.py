"""Mixture-of-head attention: which heads each patch uses, and what the heads of the query attend to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, gelu, normalize

from vislm.attention.head_routing import Routing
from vislm.attention.moh_pooled import PooledGrid
from vislm.attention.tokens import split_heads, to_map, to_tokens
from vislm.kernels import Neighborhood, RelativeBias, StatisticsRequest, Window, attention_statistics
from vislm.report.attention_views.panel import Layer, Panel, array
from vislm.report.attention_views.rows import WEIGHTS, Row, head_panels, on_grid, projected, query_weights


def moh_row(layer: Layer, place: tuple[int, int]) -> Row:
    """Return the weights of a patch in ``moh`` attention, for all heads, used or not."""
    attention, (query, key) = layer.attention, projected(layer)
    query, key = attention.q_norm(query), attention.k_norm(key)
    return on_grid(query_weights(query, key, layer.token(place), scale=attention.scale), layer.grid)


def cosine_row(layer: Layer, place: tuple[int, int]) -> Row:
    """Return the weights of a patch in ``moh_cosine`` attention, for all heads, used or not."""
    attention, (query, key) = layer.attention, projected(layer)
    table = attention.bias_table(*(torch.arange(side - 1, -side, -1) for side in layer.grid))
    weights = query_weights(
        attention.scaled(normalize(query, dim=-1), layer.x.shape[1]),
        normalize(key, dim=-1),
        layer.token(place),
        Window(layer.grid, layer.grid, prefix=layer.num_prefix),
        bias=RelativeBias(table),
        scale=1.0,
    )
    return on_grid(weights, layer.grid)


def aggregated_rows(layer: Layer, place: tuple[int, int]) -> tuple[Row, Row]:
    """Return the weights of a patch in ``moh_aggregated`` attention, one softmax: of its window, of the pooled map.

    A patch has the weight of the pooled key that it is a part of, of two (they may overlap) the later one.
    """
    attention, grid, prefix = layer.attention, layer.grid, layer.num_prefix
    pooled, index = PooledGrid(grid, attention.sr_ratio), layer.token(place)
    sides = math.prod(pooled.sides)
    coarse = to_tokens(adaptive_avg_pool2d(gelu(attention.sr(to_map(layer.x[:, prefix:], grid))), pooled.sides))
    unit = normalize(split_heads(attention.q(layer.x), attention.num_heads), dim=-1)
    query = attention.scaled(unit, attention.visible(grid, sides))
    table = attention.relative_pos_bias_local.unflatten(1, (attention.window_size,) * 2)
    nearby = {"pattern": Neighborhood(grid, attention.window_size, border="mask", prefix=prefix)}
    near, near_lse = _with_lse(query, attention.keys_values(layer.x)[0], index, bias=RelativeBias(table), **nearby)
    offsets = pooled.expanded(attention.bias_table(*pooled.offsets()), index - prefix, index - prefix + 1)[..., :sides]
    key, _ = attention.keys_values(attention.norm(coarse))
    far, far_lse = _with_lse(query[:, :, index : index + 1], key, 0, bias=offsets[None])
    share = 1 / (1 + np.exp(far_lse - near_lse))[:, None]
    cells = [np.arange(side) * count // side for side, count in zip(grid, pooled.sides, strict=True)]
    spread = (far * (1 - share)).reshape(-1, *pooled.sides)[:, cells[0][:, None], cells[1]]
    return on_grid(near * share, grid), Row(spread, np.zeros(len(far)))


def _with_lse(query: Tensor, key: Tensor, index: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return a query's weights ``(H, Nk)`` and the logarithm of what they were divided by, ``(H,)``."""
    lse = attention_statistics(query, key, request=StatisticsRequest(lse=True), scale=1.0, **options).lse
    assert lse is not None
    return query_weights(query, key, index, scale=1.0, **options), array(lse[0, :, index])


def routing_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int], row: Row) -> list[Panel]:
    """Return the panels of all mixture-of-head attentions, from the weights of all heads."""
    routing: Routing = layer.attention.router(layer.x)
    index, count = layer.token(place), routing.gate.shape[-1]
    active = array(routing.active()[0, index]).astype(bool)
    gates = array(routing.gate[0, layer.num_prefix :]).T.reshape(count, *layer.grid)
    own = array(routing.gate[0, index])
    panels = [Panel("what the model sees", _routed(routing, active))]
    if routing.kept is not None:
        shared = count - routing.kept.shape[-1]
        panels.append(_gate_maps(gates[shared:], shared))
    if heads:
        return [*panels, *head_panels(row, heads)]
    mixed = np.einsum("h,hrc->rc", own / own.sum(), np.nan_to_num(row.weights))
    seen = np.isfinite(row.weights).any(axis=0)
    note = f"mean of the {active.sum()} heads that the query uses, by gate"
    panels.append(Panel("query to patches", note, 100 * np.where(seen, mixed, np.nan), WEIGHTS))
    return panels


def moh_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``moh`` attention."""
    return routing_panels(layer, place, heads, moh_row(layer, place))


def cosine_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``moh_cosine`` attention."""
    return routing_panels(layer, place, heads, cosine_row(layer, place))


def aggregated_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``moh_aggregated`` attention: inside the frame window keys, outside pooled ones."""
    window, far = aggregated_rows(layer, place)
    seen = np.isfinite(window.weights[0])
    row = Row(np.where(seen, window.weights, far.weights), window.beside)
    first, *others = routing_panels(layer, place, heads, row)
    framed = [
        Panel(p.title, p.note, p.values, p.unit, labels=p.labels, frame=None if p.labels else seen) for p in others
    ]
    return [Panel(first.title, first.note, frame=seen), *framed]


def _routed(routing: Routing, active: np.ndarray) -> str:
    if routing.kept is None:
        return f"every patch uses all {len(active)} heads"
    shared = len(active) - routing.kept.shape[-1]
    routed = ", ".join(map(str, np.flatnonzero(active[shared:]) + shared))
    always = f"always heads 0 to {shared - 1}; " if shared > 1 else "always head 0; " if shared else ""
    return f"{always}the query is routed to {routed}"


def _gate_maps(gates: np.ndarray, first: int) -> Panel:
    """Return the panel of the routed heads' gates ``(E, h, w)``, a small map for each head."""
    columns = math.ceil(math.sqrt(len(gates)))
    rows = -(-len(gates) // columns)
    maps = np.full((rows * columns, *gates.shape[1:]), np.nan)
    maps[: len(gates)] = np.where(gates > 0, gates, np.nan)
    labels = [str(first + number) for number in range(len(gates))]
    maps = maps.reshape(rows, columns, *gates.shape[1:])
    return Panel("who uses which head", "coloured: patches routed to it", maps, "gate", labels=labels)
