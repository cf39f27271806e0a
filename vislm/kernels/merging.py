"""Joining attention computed per key group, exactly or with the groups reweighted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.kernels.shapes import broadcasts_to
from vislm.kernels.softmax import masked_softmax


def merge(
    parts: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float | Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the attention over the union of disjoint key groups, and its log-sum-exp.

    With ``lse_g`` and ``o_g`` of each group: ``c_g = w_g exp(lse_g) / sum_g w_g exp(lse_g)``, ``o = sum_g c_g o_g`` and
    ``lse = log sum_g w_g exp(lse_g)``. Weights of 1 give the dense attention. Other weights multiply the attention on
    the group's keys before the rows are normalised again: redistribution as in VAR, PAI or ACT, sink removal
    (weight 0), without the attention matrix.

    Args:
        parts: per group the output ``(..., N, D)`` and log-sum-exp ``(..., N)``; a group that a query does not see has
            output 0 and lse ``-inf`` there.
        weights: per group a non-negative number, or tensor that broadcasts to the lse. None = all 1. A negative
            weight in a tensor on an accelerator is not checked (that would stall it) and gives NaN. Differentiable;
            a weight of exactly 0 removes its group for good and gets no gradient.

    Returns:
        ``out`` in the dtype of the parts, ``lse`` in float32 (float64 for float64 parts). A query that sees no group
        has output 0 and lse ``-inf``.
    """
    parts = list(parts)
    _check_parts(parts)
    dtype = torch.float64 if parts[0][0].dtype == torch.float64 else torch.float32
    logits = torch.stack([lse.to(dtype) for _, lse in parts])
    if weights is not None:
        logits = logits + torch.stack(_log_weights(list(weights), logits))
    shares, lse = masked_softmax(logits, dim=0)
    out = sum(
        (share[..., None] * part.to(dtype) for share, (part, _) in zip(shares, parts, strict=True)),
        0 * shares[0, ..., None],
    )
    return out.to(parts[0][0].dtype), lse


def _log_weights(weights: list[float | Tensor], logits: Tensor) -> list[Tensor]:
    """Return the logarithms of the weights, one (..., N) tensor per group; -inf, with zero gradient, for weight 0."""
    if len(weights) != len(logits):
        raise UsageError(f"{len(weights)} weights for {len(logits)} parts, expected one weight per part")
    logs = []
    for number, given in enumerate(weights):
        weight = torch.as_tensor(given, dtype=logits.dtype, device=logits.device)
        if not broadcasts_to(weight.shape, logits.shape[1:]):
            raise UsageError(
                f"weights[{number}] has shape {tuple(weight.shape)}, which does not broadcast to the lse's shape "
                f"{tuple(logits.shape[1:])}"
            )
        if (not isinstance(given, Tensor) or given.device.type == "cpu") and bool((weight < 0).any()):
            raise UsageError(f"weights[{number}] has a negative entry ({float(weight.min())}), expected weights >= 0")
        zero = weight == 0
        log = weight.masked_fill(zero, 1.0).log().masked_fill(zero, -torch.inf)
        logs.append(log.expand(logits.shape[1:]))
    return logs


def _check_parts(parts: list[tuple[Tensor, Tensor]]) -> None:
    if not parts:
        raise UsageError("merge() got no parts, expected at least one (output, lse) pair")
    first = parts[0][0]
    for number, (out, lse) in enumerate(parts):
        if out.shape[:-1] != lse.shape:
            raise UsageError(
                f"part {number}: the output has shape {tuple(out.shape)} and the lse {tuple(lse.shape)}, "
                "expected (..., N, D) and (..., N)"
            )
        if (out.shape, out.dtype, out.device) != (first.shape, first.dtype, first.device):
            raise UsageError(
                f"part {number} is {out.dtype} {tuple(out.shape)} on {out.device}, but part 0 is {first.dtype} "
                f"{tuple(first.shape)} on {first.device}; all parts must agree"
            )
