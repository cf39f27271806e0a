"""How much of the attention goes to the image, and how it is spread there.

These quantities are used across papers; the definitions are ours, but for CARVE's entropy (Ge et al., "Focusing by
Contrastive Attention", ECCV 2026, arXiv 2509.06461).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def shares(rows: Tensor, groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return name -> (B, H, R): the share of each group (B, K) in rows (B, H, R, K); those of all groups sum to one."""
    names = list(groups)
    mass = rows @ torch.stack([groups[name] for name in names], -1).to(rows.dtype)[:, None]
    mass = mass / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return dict(zip(names, mass.unbind(-1), strict=True))


def visual_entropy(rows: Tensor, image: Tensor) -> Tensor:
    """Return (B, H, R) in [0, 1]: entropy of rows (B, H, R, K) renormalised on the image (B, K), over ln |V|.

    NaN without at least two visual keys, or where none gets anything.
    """
    on_image = torch.where(image[:, None, None], rows, 0.0)
    total = on_image.sum(-1)
    share = on_image / total.clamp(min=torch.finfo(rows.dtype).tiny).unsqueeze(-1)
    count = image.sum(-1)[:, None, None]
    entropy = -torch.xlogy(share, share).sum(-1) / count.clamp(min=2).log()
    return torch.where((count > 1) & (total > 0), entropy, torch.nan)


def carve_entropy(rows: Tensor, image: Tensor) -> Tensor:
    """Return (B, R): entropy in nats of the head-mean map of rows (B, H, R, K), renormalised on the image (B, K).

    CARVE's accuracy falls as it rises (about 76 % at 5.1, 65 % at 6.8 with several hundred visual tokens).
    """
    mean = torch.where(image[:, None], rows.mean(1), 0.0)
    share = mean / mean.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return -torch.xlogy(share, share).sum(-1)


def sink_share(rows: Tensor, image: Tensor, sinks: Tensor) -> Tensor:
    """Return (B, H, R): the image's sinks' share (sinks, image: (B, K) bool) of the attention on the image."""
    groups = torch.stack([image, image & sinks], -1).to(rows.dtype)
    mass = rows @ groups[:, None]
    return mass[..., 1] / mass[..., 0].clamp(min=torch.finfo(rows.dtype).tiny)


def dip(image_share: Tensor) -> tuple[int, float]:
    """Return the layer behind the first two in which the image gets least, and how much, of shares (L, H).

    The curve of such means is the neglect curve; models of LLaVA's type dip in the middle layers.
    """
    curve = image_share.float().mean(-1)
    start = min(2, len(curve) - 1)
    layer = start + int(curve[start:].argmin())
    return layer, float(curve[layer])
