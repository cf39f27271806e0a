"""Attention sinks: how much of all attention a key draws, and how often it draws too much.

Source: Gu et al., "When Attention Sink Emerges in Language Models", ICLR 2025, arXiv 2410.10781;
github.com/sail-sg/Attention-Sink.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vislm.errors import UsageError

EPSILON = 0.3
"""A key is a sink in a head that gives it more than this, on average over the rows that see it."""


def importance(received: Tensor, valid: Tensor | None = None, *, causal: bool = True) -> Tensor:
    """Return (..., H, K): the mean attention that a key gets from the rows that can see it.

    Args:
        received: (..., H, K) attention received per key, summed over the rows (see ``vislm.kernels``); keys are the
            queries.
        valid: (..., K) bool, False on padding (on the left); None: no padding.
        causal: a key is seen by its own row and the later ones; False: by all rows, as in a ViT.
    """
    seen = torch.ones(received.shape[-1], device=received.device) if valid is None else valid.float()
    if causal:
        rows = seen.flip(-1).cumsum(-1).flip(-1)
    else:
        rows = seen.sum(-1, keepdim=True).expand(seen.shape)
    share = received.float() / rows.clamp(min=1.0).unsqueeze(-2)
    return share if valid is None else share.masked_fill(~valid.unsqueeze(-2), 0.0)


def importance_of(attention: Tensor, *, causal: bool = True) -> Tensor:
    """Return :func:`importance` (..., H, T) of whole matrices (..., H, T, T)."""
    return importance(attention.float().sum(-2), causal=causal)


def sink_rate(importance: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Return Sink_k (T,) in percent: the share of samples, layers and heads in which key k is a sink.

    Args:
        importance: (sample, layer, head, T), or with any other axes in front of T.
        epsilon: threshold.
    """
    if not 0.0 < epsilon < 1.0:
        raise UsageError(f"{epsilon=}: expected a share of attention between 0 and 1")
    return 100.0 * (importance > epsilon).float().flatten(0, -2).mean(0)


def from_first_valid(per_key: Tensor, valid: Tensor) -> Tensor:
    """Return (B, ..., K) with every sample's first valid key at place 0, padding moved behind as 0.

    Args:
        per_key: (B, ..., K).
        valid: (B, K) bool, padding on the left.
    """
    shift = valid.to(torch.int8).argmax(-1)
    columns = torch.arange(per_key.shape[-1], device=per_key.device) + shift[:, None]
    inside = columns < per_key.shape[-1]
    view = (len(shift), *(1,) * (per_key.dim() - 2), -1)
    index = columns.clamp(max=per_key.shape[-1] - 1).view(view).expand_as(per_key)
    return per_key.gather(-1, index) * inside.view(view)
