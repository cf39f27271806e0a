"""SG-Former's self-guided attention: few keys where tokens matter little, many where they matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from vislm.attention.tokens import split_heads
from vislm.errors import UsageError
from vislm.report.attention_views.panel import Layer, Panel, array
from vislm.report.attention_views.rows import Row, head_panels, query_weights
from vislm.report.attention_views.significance import MEAN


class MergedTokens(NamedTuple):
    """Which patches share a key.

    Attributes:
        key: ``(h, w)``, the merged token that each patch is a part of.
        part: ``(h, w)``, 0 for the least significant.
        lengths: patches per key of each part.
    """

    key: np.ndarray
    part: np.ndarray
    lengths: list[int]


def merged_tokens(layer: Layer) -> MergedTokens:
    """Return which patches ``self_guided`` attention merges.

    Raises:
        UsageError: a layer without significance.
    """
    if layer.significance is None:
        raise UsageError("self-guided attention was given no significance; it stands behind a hybrid_scale one")
    order = array(layer.significance[0].argsort(stable=True)).astype(int)
    key, part, lengths, first = np.zeros(len(order), int), np.zeros(len(order), int), [], 0
    for number, (start, end, length) in enumerate(layer.attention.parts(len(order))):
        members = order[start:end]
        key[members] = first + np.arange(end - start) // length
        part[members] = number
        first += -(-(end - start) // length)
        lengths.append(length)
    return MergedTokens(key.reshape(layer.grid), part.reshape(layer.grid), lengths)


def merged_row(layer: Layer, place: tuple[int, int]) -> Row:
    """Return the weights of a patch in ``self_guided`` attention: each patch has that of the key it is merged into."""
    attention, merged, prefix = layer.attention, merged_tokens(layer), layer.num_prefix
    tokens = torch.cat((layer.x[:, :prefix], attention.merged(layer.x[:, prefix:], layer.significance)), dim=1)
    keys = [kv(tokens).chunk(2, dim=-1)[0] for kv in (attention.kv1, attention.kv2)]
    query, key = (split_heads(part, attention.num_heads) for part in (attention.q(layer.x), torch.cat(keys, dim=-1)))
    weights = query_weights(query, key, layer.token(place), scale=attention.scale)
    return Row(weights[:, prefix:][:, merged.key], weights[:, :prefix].sum(axis=1))


def merged_panels(layer: Layer, place: tuple[int, int], heads: Sequence[int]) -> list[Panel]:
    """Return the panels of ``self_guided`` attention."""
    merged = merged_tokens(layer)
    assert layer.significance is not None
    significance = array(layer.significance[0]).reshape(layer.grid)
    names = [f"{length} patches a key" if length > 1 else "1 patch a key" for length in merged.lengths]
    count = f"{merged.key.max() + 1} keys of {merged.key.size} patches"
    parts = Panel("merged by significance", count, merged.part.astype(float), classes=names)
    rated = Panel("significance", "of the block before", significance / significance.mean(), MEAN)
    rows = merged_row(layer, place)
    weighed = [
        Panel(panel.title, "each patch with its key's weight", panel.values, panel.unit)
        for panel in head_panels(rows, heads)[: len(heads) or 1]
    ]
    return [Panel("what the model sees"), rated, parts, *weighed]
