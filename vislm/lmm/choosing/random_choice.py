"""A random choice among an image's tokens that depends on the image and a seed alone, so that any batch gives it."""

from __future__ import annotations

import torch
from torch import Tensor

from vislm.lmm.choosing.tokens import token_count
from vislm.lmm.interventions import ImageView


def random_tokens(view: ImageView, keep: int | float, seed: int) -> Tensor:
    """Return keep (n,) bool: ``keep`` tokens (or that ratio) of the candidates, each subset equally likely."""
    candidates = view.candidates.nonzero().flatten()
    generator = torch.Generator().manual_seed(seed + _content(view.features[candidates]))
    chosen = torch.randperm(len(candidates), generator=generator)[: token_count(keep, len(candidates))]
    kept = torch.zeros_like(view.candidates)
    kept[candidates[chosen.to(candidates.device)]] = True
    return kept


def _content(features: Tensor) -> int:
    """Return a number that tells one image from another: the signs of 24 mean features."""
    signs = (features[:, :24].float().mean(0) > 0).long()
    return int((signs << torch.arange(len(signs), device=signs.device)).sum())
