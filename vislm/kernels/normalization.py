"""How logits become weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vislm.errors import UnknownName, UsageError
from vislm.kernels.softmax import masked_softmax

NORMALIZATIONS = ("softmax", "sigmoid")
ROW_NORMS = ("length", "sqrt_length")


@dataclass(frozen=True)
class Sigmoid:
    """Sigmoid attention: ``sigmoid(logits * exp(temperature) + bias)``, exactly 0 where the pattern hides a key.

    Weights of one key do not depend on the other keys and do not sum to one, so there is no log-sum-exp.

    Args:
        bias: added to every logit; None = ``-log(Nk)`` of the call, which gives rows of mass near 1 at the start of
            training. A trained model keeps the number of its training length: give that.
        temperature: logarithm of the factor of the logits.
        row_norm: None, or divide the row of the query at position i (from 0) by ``i + 1`` (``"length"``) or its square
            root (``"sqrt_length"``).

    Source: arXiv 2409.04431; https://github.com/apple/ml-sigmoid-attention.
    """

    bias: float | None = None
    temperature: float = 0.0
    row_norm: Literal["length", "sqrt_length"] | None = None

    def weights(self, logits: Tensor, position: Tensor) -> Tensor:
        """Return the weights of ``logits`` ``(..., R, Nk)`` whose rows stand at ``position`` (broadcastable)."""
        assert self.bias is not None  # filled in when the call was checked
        weights = torch.sigmoid(logits * math.exp(self.temperature) + self.bias)
        if self.row_norm is None:
            return weights
        length = (position + 1).clamp_min(1).to(weights.dtype)
        return weights / (length if self.row_norm == "length" else length.sqrt())


def normalized(normalize: Literal["softmax"] | Sigmoid, logits: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights and the log-sum-exp of rows of logits; for sigmoid the logarithm of the row's sum.

    Args:
        normalize: the checked normalisation of a call.
        logits: ``(B, Hq, R, Nk)``, ``-inf`` where not allowed.
        position: of the rows on the key axis, broadcastable to ``(B, Hq, R, 1)``.
    """
    if normalize == "softmax":
        return masked_softmax(logits)
    weights = normalize.weights(logits, position)
    total = weights.sum(-1)
    blind = total == 0
    return weights, total.masked_fill(blind, 1.0).log().masked_fill(blind, -torch.inf)


def row_entropy(normalize: Literal["softmax"] | Sigmoid, logits: Tensor, weights: Tensor, log_sum: Tensor) -> Tensor:
    """Return the entropy of each row in nats, from what :func:`normalized` gave.

    Unnormalised rows are divided by their sum first. Rows without any weight have entropy 0.
    """
    unseen = weights == 0
    if normalize == "softmax":
        information = (logits - log_sum[..., None]).masked_fill(unseen, 0.0)  # log A, with 0 log 0 = 0
        return -(weights * information).sum(-1)
    blind = log_sum == -torch.inf
    log_sum = log_sum.masked_fill(blind, 0.0)[..., None]
    information = weights.masked_fill(unseen, 1.0).log() - log_sum
    return -(weights * (-log_sum).exp() * information.masked_fill(unseen, 0.0)).sum(-1)


def checked_normalization(normalize: object, num_keys: int) -> Literal["softmax"] | Sigmoid:
    """Return ``"softmax"`` or a :class:`Sigmoid` with its bias filled in."""
    if normalize == "softmax":
        return "softmax"
    if normalize == "sigmoid":
        normalize = Sigmoid()
    if not isinstance(normalize, Sigmoid):
        raise UnknownName("normalization", str(normalize), NORMALIZATIONS)
    if normalize.row_norm is not None and normalize.row_norm not in ROW_NORMS:
        raise UnknownName("row_norm", str(normalize.row_norm), ROW_NORMS)
    for name in ("bias", "temperature"):
        given = getattr(normalize, name)
        number = isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)
        if not number and not (name == "bias" and given is None):
            raise UsageError(f"Sigmoid has {name}={given!r}, expected a finite number")
    return replace(normalize, bias=-math.log(max(1, num_keys))) if normalize.bias is None else normalize
