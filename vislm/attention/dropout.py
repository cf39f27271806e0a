"""Dropout of attention weights, which fused attention cannot do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout

from vislm.kernels import Bias, Pattern, StatisticsRequest, attend, attention_statistics


def attend_dropping(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probability: float,
    *,
    pattern: Pattern,
    bias: Bias | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the attention output ``dropout(weights) v``, ``(B, H, N, Dv)``; see :func:`vislm.attend`.

    With a probability of 0 this is ``attend``. Otherwise the weights of all queries are formed: O(Nq Nk) memory.
    """
    if probability == 0.0:
        return attend(query, key, value, pattern=pattern, bias=bias, scale=scale)
    everyone = StatisticsRequest(rows=torch.arange(query.shape[2]))
    weights = attention_statistics(query, key, request=everyone, pattern=pattern, bias=bias, scale=scale).rows
    assert weights is not None
    return dropout(weights, probability).to(value.dtype) @ value
