"""The softmax of the whole package: exact for rows that see nothing, in value and in gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_softmax(logits: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Return the softmax of ``logits`` along ``dim`` and the log-sum-exp (without that axis).

    Where all logits are ``-inf`` (also where there are none) the weights are 0 and the log-sum-exp ``-inf``, with
    zero gradients instead of NaN.
    """
    largest = _largest(logits.detach(), dim)
    powers = (logits - largest).exp()
    total = powers.sum(dim, keepdim=True)
    blind = total == 0
    total = total.masked_fill(blind, 1.0)  # before the logarithm, whose gradient at 0 is infinite
    lse = (largest + total.log()).masked_fill(blind, -torch.inf)
    return powers / total, lse.squeeze(dim)


def _largest(logits: Tensor, dim: int) -> Tensor:
    """Return the largest logit, with ``dim`` kept as size 1; 0 where there is none above ``-inf``."""
    if logits.shape[dim] == 0:
        return logits.sum(dim, keepdim=True)
    largest = logits.amax(dim, keepdim=True)
    return largest.masked_fill(largest == -torch.inf, 0.0)
