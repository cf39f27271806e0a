"""Choosing visual tokens behind the tower, crop by crop: signals, budgets, and seats for tokens that are new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.kernels import StatisticsRequest
from vislm.lmm.choosing.tokens import check_keep, token_count
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import ImageView, Selection


def patch_attention(call: AttentionCall, prefix: int) -> Tensor:
    """Return the attention that patches receive (K, N, 1), mean over heads, float32.

    From CLS at index 0 where the tower has a prefix, otherwise the mean over all tokens. The softmax runs over all
    tokens; the ``prefix`` ones are left out of the result.
    """
    if prefix:
        attention = call.rows(torch.tensor([0])).squeeze(2).mean(1)
    else:
        received = call.statistics(StatisticsRequest(received=True)).received
        assert received is not None
        attention = received.mean(1) / call.query.shape[2]
    return attention[:, prefix:].unsqueeze(-1)


def packed(view: ImageView, signal: str) -> Tensor:
    """Return a tower signal (K, N, c) in the order of the tokens, (n, c); newline tokens have 0."""
    assert view.tower is not None
    assert view.pack is not None
    return view.pack(view.tower.signals[signal], 0.0)


def packed_features(view: ImageView, prefix: int) -> Tensor:
    """Return what the tokens are made of (n, Cv), float32: the tower's features, or the projected ones.

    Projected ones stand in where the tower joins patches before its projector.
    """
    assert view.tower is not None
    assert view.pack is not None
    if view.tower.features is None:
        return view.features.float()
    return view.pack(view.tower.features[:, prefix:].float(), 0.0)


def projected(view: ImageView, features: Tensor) -> Tensor:
    """Return new tokens (m, C) as the language model reads them, from what they are made of (m, Cv), float32."""
    assert view.tower is not None
    if view.tower.features is None or view.project is None:
        return features.to(view.features.dtype)
    return view.project(features.to(view.tower.features.dtype))


def crop_tokens(view: ImageView, signal: str) -> list[Tensor]:
    """Return the ascending token indices (n_k,) of each crop; newlines and padding belong to none.

    A token that is pooled from two crops goes to the one with the larger share.

    Args:
        view: the image.
        signal: any of its signals per patch, (K, N, c).
    """
    assert view.tower is not None
    assert view.pack is not None
    crops, patches = view.tower.signals[signal].shape[:2]
    number = torch.arange(crops, device=view.features.device, dtype=torch.float32)
    number = view.pack(number[:, None, None].expand(crops, patches, 1), -1.0)[:, 0].round()
    return [((number == crop) & view.candidates).nonzero().squeeze(1) for crop in range(crops)]


def check_budget(keep: int | float, crop_keep: int | None) -> None:
    """Raise ``UsageError`` unless ``keep`` is a number of tokens or a ratio, and ``crop_keep`` a number or None."""
    check_keep(keep)
    if crop_keep is None:
        return
    if isinstance(crop_keep, bool) or not isinstance(crop_keep, int) or crop_keep < 1:
        raise UsageError(f"crop_keep={crop_keep!r}: expected a number of tokens for each crop; give a ratio as keep")


def crop_budgets(sizes: Sequence[int], keep: int | float, crop_keep: int | None) -> list[int]:
    """Return how many tokens each crop keeps.

    Args:
        sizes: tokens of each crop.
        keep: tokens of the image, or a ratio of them. Crops get equal shares; what a small crop cannot use goes to the
            others, and the remainder to the first.
        crop_keep: the same number for every crop instead, whatever the number of crops.
    """
    if crop_keep is not None:
        return [min(crop_keep, size) for size in sizes]
    left, budgets = token_count(keep, sum(sizes)), [0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda crop: (sizes[crop], -crop))
    for done, crop in enumerate(order):
        budgets[crop] = min(sizes[crop], left // (len(sizes) - done))
        left -= budgets[crop]
    return budgets


@dataclass(frozen=True)
class Group:
    """k tokens that stay, in seats of the prompt."""

    seats: Tensor
    """(k,) distinct; no two groups share one."""
    order: Tensor
    """(k,) int64 sort key: the token with the lowest key of all groups sits in the first of all their seats."""
    made: Tensor | None = None
    """(k, Cv) float32: what new tokens are made of, before the projector; None: the tokens that were in the seats."""
    members: Tensor | None = None
    """(j,) original tokens that went into this group; None: each seat's own."""
    owner: Tensor | None = None
    """(j,) which of the k tokens each member went into."""


def seated(view: ImageView, groups: Sequence[Group]) -> Selection:
    """Return the selection of all groups' tokens, m in total, with their sizes and sources."""
    features, sizes = [], []
    into = torch.full((len(view.features),), -1, device=view.features.device)
    made = [group.made for group in groups if group.made is not None]
    new = iter(projected(view, torch.cat(made)).split([len(part) for part in made]) if made else ())
    first = 0
    for group in groups:
        own = torch.arange(len(group.seats), device=into.device)
        members, owner = (group.seats, own) if group.members is None else (group.members, group.owner)
        assert owner is not None
        into[members] = owner + first
        sizes.append(owner.bincount(minlength=len(own)).clamp(min=1).float())
        features.append(view.features[group.seats] if group.made is None else next(new))
        first += len(own)
    rank = torch.argsort(torch.cat([group.order for group in groups]), stable=True)
    place = torch.empty_like(rank)
    place[rank] = torch.arange(len(rank), device=rank.device)
    keep = torch.zeros_like(view.candidates)
    keep[torch.cat([group.seats for group in groups])] = True
    source = torch.where(into < 0, into, place[into.clamp(min=0)])
    return Selection(keep, torch.cat(features)[rank], torch.cat(sizes)[rank], source)
