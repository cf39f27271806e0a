"""The softmax weights of one query, from the kernels' row statistics, and how heads are chosen for a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from vislm.attention.tokens import split_heads
from vislm.errors import UsageError
from vislm.kernels import Dense, Pattern, StatisticsRequest, attention_statistics
from vislm.report.attention_views.panel import Layer, Panel, array

WEIGHTS = "% of its weights"


@dataclass(frozen=True, eq=False)
class Row:
    """What a query gives to the keys.

    Attributes:
        weights: ``(H, h, w)``, a number for each head and patch; NaN where the query sees no key.
        beside: ``(H,)``, given to keys that are no patches: class and register tokens, padding.
    """

    weights: np.ndarray
    beside: np.ndarray


def query_weights(query: Tensor, key: Tensor, index: int, pattern: Pattern | None = None, **options: Any) -> np.ndarray:
    """Return the weights ``(H, Nk)`` of a query, NaN for the keys that it does not see.

    Args:
        query: ``(1, H, Nq, D)``.
        key: ``(1, H, Nk, D)``.
        index: which query.
        pattern: which query sees which key; None = each sees all.
        options: ``bias, scale, key_logits, normalize`` of :func:`vislm.kernels.attention_statistics`.
    """
    pattern = Dense() if pattern is None else pattern
    rows = attention_statistics(query, key, request=StatisticsRequest(rows=(index,)), pattern=pattern, **options).rows
    assert rows is not None
    keys = torch.arange(key.shape[2])
    position = torch.tensor([[index + key.shape[2] - query.shape[2]]])
    seen = pattern.mask(position, keys[None]).expand(1, len(keys)).numpy()
    return np.where(seen, array(rows[0, :, 0]), np.nan)


def on_grid(weights: np.ndarray, grid: Sequence[int]) -> Row:
    """Return weights ``(H, R + h w)`` of prefix tokens and patches as a :class:`Row`."""
    prefix = weights.shape[1] - grid[0] * grid[1]
    return Row(weights[:, prefix:].reshape(-1, *grid), np.nansum(weights[:, :prefix], axis=1))


def projected(layer: Layer, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return query and key ``(1, H, N, D)`` of an attention with one projection ``qkv``."""
    query, key, _ = layer.attention.qkv(layer.x if x is None else x).chunk(3, dim=-1)
    return split_heads(query, layer.attention.num_heads), split_heads(key, layer.attention.num_heads)


def prefix_logits(attention: Any, keys: int) -> Tensor | None:
    """Return the key logits ``(1, H, Nk)`` that a patch's weights have of a model whose attention was replaced."""
    logits = getattr(attention, "prefix_logits", None)
    return None if logits is None else pad(logits[0], (0, keys - logits.shape[-1]))[None]


def head_panels(row: Row, heads: Sequence[int], **drawn: Any) -> list[Panel]:
    """Return a panel for each head asked for; for none, the mean of all and the head that is most focused.

    Args:
        row: the weights.
        heads: counted from 0.
        drawn: ``regions, frame`` of :class:`Panel`.

    Raises:
        UsageError: a head that there is not.
    """
    count = len(row.weights)
    chosen = [(f"head {head} of {count}", checked_head(head, count)) for head in heads]
    if not chosen:
        mean = Row(row.weights.mean(axis=0, keepdims=True), row.beside.mean(keepdims=True))
        focused = int(np.argmin(_entropy(row.weights)))
        panels = [_panel("mean of the heads" if count > 1 else "the only head", mean, 0, drawn)]
        if count > 1:
            panels.append(_panel(f"head {focused}, most focused of {count}", row, focused, drawn))
        return panels
    return [_panel(title, row, head, drawn) for title, head in chosen]


def checked_head(head: int, count: int) -> int:
    """Return a head's number; raise ``UsageError`` if there is no such head."""
    if not 0 <= head < count:
        raise UsageError(f"head {head}, expected a number from 0 to {count - 1}: the layer has {count} heads")
    return head


def _panel(title: str, row: Row, head: int, drawn: dict[str, Any]) -> Panel:
    note = f"{np.isfinite(row.weights[head]).sum()} keys"
    if row.beside[head] >= 0.0005:
        note += f"; {row.beside[head]:.1%} of the weight is not on patches"
    return Panel(title, note, 100 * row.weights[head], WEIGHTS, **drawn)


def _entropy(weights: np.ndarray) -> np.ndarray:
    share = np.nan_to_num(weights.reshape(len(weights), -1))
    share = share / np.maximum(share.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    return -(share * np.log(np.maximum(share, np.finfo(float).tiny))).sum(axis=1)
