"""Dropout of attention weights, which fused attention cannot do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from vislm.kernels import Bias, Dense, Pattern, StatisticsRequest, attend, attention_statistics


def attend_dropping(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probability: float,
    *,
    pattern: Pattern,
    bias: Bias | None = None,
    scale: float | None = None,
    prefix_logits: Tensor | None = None,
) -> Tensor:
    """Return the attention output ``dropout(weights) v``, ``(B, H, N, Dv)``; see :func:`vislm.attend`.

    With a probability of 0 this is ``attend``. Otherwise the weights of all queries are formed: O(Nq Nk) memory.

    Args:
        prefix_logits: ``(2, H, R)``, added to the logits of the R prefix tokens as keys, of the grid's queries and of
            the prefix's (which see all tokens). The other arguments are those of :func:`vislm.attend`.
    """
    if prefix_logits is not None:
        return _with_prefix_logits(query, key, value, probability, pattern, bias, scale, prefix_logits)
    return _attend(query, key, value, probability, pattern, bias, scale, None)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probability: float,
    pattern: Pattern,
    bias: Bias | None,
    scale: float | None,
    key_logits: Tensor | None,
) -> Tensor:
    options: dict[str, Any] = {"pattern": pattern, "bias": bias, "scale": scale, "key_logits": key_logits}
    if probability == 0.0:
        return attend(query, key, value, **options)
    everyone = StatisticsRequest(rows=torch.arange(query.shape[2]))
    weights = attention_statistics(query, key, request=everyone, **options).rows
    assert weights is not None
    return dropout(weights, probability).to(value.dtype) @ value


def _with_prefix_logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probability: float,
    pattern: Pattern,
    bias: Bias | None,
    scale: float | None,
    prefix_logits: Tensor,
) -> Tensor:
    prefix = prefix_logits.shape[-1]
    of_grid, of_prefix = (
        pad(logits, (0, key.shape[2] - prefix)).expand(len(key), -1, -1).to(key.dtype) for logits in prefix_logits
    )
    everyone = _attend(query, key, value, probability, pattern, bias, scale, of_grid)
    asked = _attend(query[:, :, :prefix], key, value, probability, Dense(), None, scale, of_prefix)
    return torch.cat((asked, everyone[:, :, prefix:]), dim=2)
