"""Edits of attention rows that several head methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from vislm.lmm.key_groups import KeyGroups


def scale_groups(logits: Tensor, keys: KeyGroups, image: float, before: float) -> Tensor:
    """Return logits (B, H, R, K) times ``image`` on image keys and times ``before`` on the keys in front of them."""
    factors = torch.where(keys.image, image, torch.where(keys.before, before, 1.0))
    return logits * factors[:, None, None]


def silence_text(weights: Tensor, keys: KeyGroups, threshold: float) -> Tensor:
    """Return weights (B, H, R, K) without the keys behind the image, in rows that give those ``threshold`` or more.

    Nothing is put in their place: such a row sums to what was left.
    """
    text = keys.after[:, None, None]
    mass = torch.where(text, weights, 0.0).sum(-1, keepdim=True)
    return torch.where(text & (mass >= threshold), 0.0, weights)
