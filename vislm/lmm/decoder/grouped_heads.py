"""Products of rows with the keys or values of grouped heads, in float32 and without repeating or copying a cache.

Heads that share their keys become rows of one product. A cache in half precision is widened a piece at a time, so that
its float32 copy stays in the processor's own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

WIDE = 2**18
"""Entries that are widened to float32 at once on a CPU (1 MiB)."""


def products(query: Tensor, key: Tensor, heads: Sequence[int] | None = None) -> Tensor:
    """Return query . key (B, H', R, K).

    Args:
        query: (B, H, R, d) float32.
        key: (B, G, K, d) in any precision, H a multiple of G.
        heads: some of the H heads; None: all.
    """
    if heads is None:
        return _times_keys(_folded(query, key.shape[1]), key).view(*query.shape[:3], -1)
    parts = [
        _times_keys(query[:, own].flatten(1, 2)[:, None], key[:, group, None]).view(
            len(query), len(own), -1, key.shape[2]
        )
        for group, own, _ in heads_by_group(tuple(heads), query.shape[1] // key.shape[1])
    ]
    return _in_order(parts, tuple(heads), query.shape[1] // key.shape[1])


def mixtures(weights: Tensor, value: Tensor, total: int, heads: Sequence[int] | None = None) -> Tensor:
    """Return weights times value (B, H', R, d).

    Args:
        weights: (B, H', R, K) float32.
        value: (B, G, K, d) in any precision.
        total: H, all heads.
        heads: the H' heads of the weights; None: all.
    """
    if heads is None:
        return _times_values(_folded(weights, value.shape[1]), value).view(*weights.shape[:3], -1)
    share = total // value.shape[1]
    groups = heads_by_group(tuple(heads), share)
    parts = []
    for group, _, places in groups:
        own = weights if len(groups) == 1 else weights[:, places]
        mixed = _times_values(own.flatten(1, 2)[:, None], value[:, group, None])
        parts.append(mixed.view(*own.shape[:3], -1))
    return _in_order(parts, tuple(heads), share)


@lru_cache(maxsize=1024)
def heads_by_group(heads: tuple[int, ...], share: int) -> list[tuple[int, list[int], list[int]]]:
    """Return (group, its heads, their places in the list) of every group in a list of heads.

    Args:
        heads: in any order.
        share: heads of a group.
    """
    places: dict[int, list[int]] = {}
    for place, head in enumerate(heads):
        places.setdefault(head // share, []).append(place)
    return [(group, [heads[place] for place in own], own) for group, own in places.items()]


@lru_cache(maxsize=1024)
def head_mask(heads: tuple[int, ...], total: int, device: torch.device) -> Tensor:
    """Return (H, 1, 1) bool: whether each of ``total`` heads is listed."""
    with torch.inference_mode(False):  # or it could not be used outside of that mode later
        listed = torch.zeros(total, 1, 1, dtype=torch.bool)
        listed[list(heads)] = True
        return listed.to(device)


@lru_cache(maxsize=1024)
def head_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the listed heads (H',) int64."""
    with torch.inference_mode(False):  # as above
        return torch.tensor(heads, device=device)


def _folded(rows: Tensor, groups: int) -> Tensor:
    """Return rows (B, H, R, n) of the heads of a group below each other, (B, G, H / G * R, n)."""
    return rows.reshape(rows.shape[0], groups, -1, rows.shape[3])


def _in_order(parts: list[Tensor], heads: tuple[int, ...], share: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    joined = torch.cat(parts, 1)
    order = [place for _, _, places in heads_by_group(heads, share) for place in places]
    if order == sorted(order):
        return joined
    back = torch.tensor(order, device=joined.device).argsort()
    return joined[:, back]


def _pieces(cached: Tensor) -> int | None:
    """Return how many columns of (B, G, K, d) are widened at once; None if all, or if there is nothing to widen."""
    if cached.dtype == torch.float32 or cached.device.type != "cpu" or cached.numel() <= WIDE:
        return None
    return max(1, WIDE * cached.shape[2] // cached.numel())


def _times_keys(rows: Tensor, key: Tensor) -> Tensor:
    """Return rows (B, G, M, d) times keys (B, G, K, d), (B, G, M, K)."""
    size = _pieces(key)
    if size is None:
        return rows @ key.float().mT
    return torch.cat([rows @ piece.float().mT for piece in key.split(size, 2)], -1)


def _times_values(rows: Tensor, value: Tensor) -> Tensor:
    """Return rows (B, G, M, K) times values (B, G, K, d), (B, G, M, d)."""
    size = _pieces(value)
    if size is None:
        return rows @ value.float()
    pieces = zip(rows.split(size, -1), value.split(size, 2), strict=True)
    first, *others = (own @ piece.float() for own, piece in pieces)
    for other in others:
        first += other
    return first
