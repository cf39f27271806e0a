"""Squared distance between points, weighted per query and head, as a few channels."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vislm.errors import UnknownName, UsageError
from vislm.kernels.bias import LowRankBias

DistanceForm = Literal["compact", "paper", "softmax"]


def squared_distance_bias(
    query_points: Tensor, key_points: Tensor, weight: Tensor | float = 1.0, *, form: DistanceForm = "compact"
) -> LowRankBias:
    """Return ``-weight_i |x_i - y_j|^2`` in factors, for points of ``P`` coordinates.

    =============  ===========================================  ======
    form           query factor | key factor                    rank
    =============  ===========================================  ======
    ``"compact"``  ``-w [x.x, 1, -2 x]``   | ``[1, y.y, y]``       P + 2
    ``"paper"``    ``-w [x_c^2, 1, -2 x_c]`` | ``[1, y_c^2, y_c]``, one triple per coordinate ``c``   3 P
    ``"softmax"``  ``-w [1, -2 x]``        | ``[y.y, y]``; without what is constant along a row: exact for
                   softmax, wrong for sigmoid attention   P + 1
    =============  ===========================================  ======

    Args:
        query_points: ``(Nq, P)``, ``(B, Nq, P)`` or ``(B, H, Nq, P)``.
        key_points: ``(Nk, P)``, ``(B, Nk, P)`` or ``(B, H, Nk, P)``.
        weight: a number, or a tensor that broadcasts to ``(B, H, Nq)``. All three tensors get gradients.
        form: see the table.

    Raises:
        UsageError: shapes that do not fit.
    """
    if form not in get_args(DistanceForm):
        raise UnknownName("distance form", str(form), get_args(DistanceForm))
    query, key = _points("query_points", query_points), _points("key_points", key_points)
    if query.shape[-1] != key.shape[-1]:
        raise UsageError(f"query_points have {query.shape[-1]} coordinates, key_points {key.shape[-1]}")
    # Distances do not change with the origin, but x.x - 2 x.y + y.y cancels badly far from it.
    origin = key.detach().mean(dim=(0, 1, 2))
    query, key = query - origin, key - origin
    factor = -_weight(weight, query)[..., None]
    if form == "paper":
        query_channels = torch.stack([query.square(), torch.ones_like(query), -2 * query], dim=-1).flatten(-2)
        key_channels = torch.stack([torch.ones_like(key), key.square(), key], dim=-1).flatten(-2)
    else:
        one, square = torch.ones_like(query[..., :1]), query.square().sum(-1, keepdim=True)
        query_channels = torch.cat([*([] if form == "softmax" else [square]), one, -2 * query], dim=-1)
        one, square = torch.ones_like(key[..., :1]), key.square().sum(-1, keepdim=True)
        key_channels = torch.cat([*([] if form == "softmax" else [one]), square, key], dim=-1)
    return LowRankBias(factor * query_channels, key_channels)


def _points(name: str, points: Tensor) -> Tensor:
    """Return points as (1 or B, 1 or H, N, P)."""
    if not isinstance(points, Tensor) or not points.is_floating_point() or points.ndim not in (2, 3, 4):
        given = f"{points.dtype} {tuple(points.shape)}" if isinstance(points, Tensor) else repr(points)
        raise UsageError(f"{name} is {given}, expected floating-point (N, P), (B, N, P) or (B, H, N, P)")
    if 0 in points.shape:
        raise UsageError(f"{name} has shape {tuple(points.shape)}, expected no empty axis")
    return points[(None,) * (4 - points.ndim)] if points.ndim != 3 else points[:, None]


def _weight(weight: Tensor | float, query: Tensor) -> Tensor:
    """Return the weight as (1 or B, 1 or H, 1 or Nq)."""
    tensor = torch.as_tensor(weight, dtype=query.dtype, device=query.device)
    tensor = tensor[(None,) * (3 - tensor.ndim)]
    if tensor.ndim != 3 or tensor.shape[-1] not in (1, query.shape[2]):
        raise UsageError(
            f"weight has shape {tuple(tensor.shape)}, which does not broadcast to (B, H, Nq) with Nq = {query.shape[2]}"
        )
    return tensor
