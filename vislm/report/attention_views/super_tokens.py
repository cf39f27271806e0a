"""Super-token attention: the tessellation, the query's association, and what it reads through the super tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from vislm.kernels.super_token import spread
from vislm.report.attention_views.dense import SEEN
from vislm.report.attention_views.panel import Layer, Panel, array
from vislm.report.attention_views.rows import WEIGHTS, Row, head_panels, on_grid, query_weights


class SuperTokenMaps(NamedTuple):
    """What a query has to do with the super tokens, M of them.

    Attributes:
        tessellation: ``(h, w)``, which super token each patch belongs to most.
        association: ``(M,)`` of the query.
        refined: ``(H, M)``, what the query gives to each super token through their attention among each other; None if
            they are refined otherwise.
        row: what it gives to the patches that the super tokens are means of; None as above.
    """

    tessellation: np.ndarray
    association: np.ndarray
    refined: np.ndarray | None
    row: Row | None


def super_token_maps(layer: Layer, place: tuple[int, int]) -> SuperTokenMaps:
    """Return association and attention of a patch in ``super_token`` attention, for cells of more than one patch."""
    attention, (height, width) = layer.attention, layer.grid
    padded, cells = attention.cells(layer.grid)
    super_tokens, association = attention.sample(layer.x, layer.grid)
    count = cells[0] * cells[1]
    every = array(spread(torch.eye(count).to(association)[None], association, padded, attention.stoken_size))[0]
    own = every[place[0] * padded[1] + place[1]]
    refined, row = _reached(layer, own, torch.cat((layer.x[:, : layer.num_prefix], super_tokens), dim=1)), None
    if refined is not None:
        means = every / np.maximum(every.sum(axis=0), np.finfo(float).tiny)
        patches = (refined @ means.T).reshape(-1, *padded)[:, :height, :width]
        row = Row(patches, own.sum() - patches.sum(axis=(1, 2)))
    labels = array(attention.tessellation(layer.x, layer.grid)[0]).astype(int)
    return SuperTokenMaps(labels, own, refined, row)


def super_token_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``super_token`` attention."""
    attention = layer.attention
    if attention.stoken_size == (1, 1) and attention.refine == "attention":
        return [SEEN, *head_panels(on_grid(_among(layer, layer.x, place)[:, 0], layer.grid), heads)]
    maps = super_token_maps(layer, place)
    labels = maps.tessellation
    near = np.where(maps.association > 0, maps.association, np.nan)
    size = " x ".join(map(str, attention.stoken_size))
    panels = [
        Panel("what the model sees", f"{len(near)} super tokens, from cells of {size}", regions=labels),
        Panel("association", "query with the super tokens around it", 100 * near[labels], "%", regions=labels),
    ]
    if maps.refined is not None and maps.row is not None:
        reached = head_panels(Row(maps.refined[:, labels], np.zeros(len(maps.refined))), heads)
        through = head_panels(maps.row, heads)
        for ours, patches in zip(reached[: len(heads) or 1], through, strict=False):
            panels.append(Panel("query to super tokens", ours.title, ours.values, WEIGHTS, regions=labels))
            panels.append(Panel("query to patches", "through super tokens", patches.values, WEIGHTS, regions=labels))
    return panels


def _reached(layer: Layer, association: np.ndarray, tokens: torch.Tensor) -> np.ndarray | None:
    """Return what a query of that association gives to super tokens, ``(H, M)``; None where no attention says so."""
    if layer.attention.refine == "none":
        return association[None]
    if layer.attention.refine == "conv":
        return None
    return np.einsum("m,hmk->hk", association, _among(layer, tokens))[:, layer.num_prefix :]


def _among(layer: Layer, tokens: torch.Tensor, place: tuple[int, int] | None = None) -> np.ndarray:
    """Return the weights ``(H, Q, Nk)`` of the attention among tokens: of a patch, or of all behind the prefix."""
    refine = layer.attention.stoken_refine
    heads = refine.qkv(tokens).unflatten(-1, (refine.num_heads, 3, -1)).transpose(1, 2)
    query, key, _ = heads.unbind(3)
    asked = range(layer.num_prefix, tokens.shape[1]) if place is None else (layer.token(place),)
    return np.stack([query_weights(query, key, index, scale=refine.scale) for index in asked], axis=1)
