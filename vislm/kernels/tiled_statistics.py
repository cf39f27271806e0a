"""Differentiable statistics from a few query rows at a time: O(N) memory per head, never the N x N matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vislm.kernels.normalization import normalized, row_entropy
from vislm.kernels.request import AttentionRequest, CheckedStatistics
from vislm.kernels.rows import row_logits, row_position, row_weights, visit
from vislm.kernels.statistics import Statistics


class _Tile(NamedTuple):
    """The statistics of one tile of ``T`` queries; ``mass`` is ``(B, Hq, T, groups)``, ``received`` the tile's sum."""

    lse: Tensor
    received: Tensor | None
    mass: Tensor | None
    entropy: Tensor | None
    maximum: Tensor | None


def tiled_statistics(request: AttentionRequest, output: Tensor | None) -> Statistics:
    """Return the statistics that ``request`` wants; differentiable: each tile is recomputed in the backward pass.

    Args:
        request: the validated call.
        output: the attention output ``(B, Hq, Nq, Dv)`` before ``head_scale``; needed for ``output_norm`` only.
    """
    wanted = request.statistics
    tiles: list[_Tile] = []
    received: Tensor | None = None
    if visits_every_query(wanted):
        everyone = torch.arange(request.shape.num_queries, device=request.shape.device)[None]
        for tile in visit(request, everyone, lambda index: _tile(request, wanted, index)):
            received = _plus(received, tile.received)
            tiles.append(tile._replace(received=None))  # or the column sums of all tiles would stay alive
    everywhere = Statistics(
        lse=_joined([tile.lse for tile in tiles]) if wanted.lse else None,
        received=received,
        mass=named_groups(wanted.mass, _joined([tile.mass for tile in tiles])),
        entropy=_joined([tile.entropy for tile in tiles]),
        maximum=_joined([tile.maximum for tile in tiles]),
    )
    return with_chosen(everywhere, request, output)


def with_chosen(everywhere: Statistics, request: AttentionRequest, output: Tensor | None) -> Statistics:
    """Return the statistics of all queries together with those of chosen queries and of the output."""
    wanted, received = request.statistics, everywhere.received
    if wanted.received_queries is not None:
        for columns in visit(request, wanted.received_queries, lambda index: row_weights(request, index).sum(-2)):
            received = _plus(received, columns)
    return replace(
        everywhere,
        rows=None if wanted.rows is None else row_weights(request, wanted.rows),
        received=received,
        output_norm=output.to(request.dtype).norm(dim=-1) if wanted.output_norm and output is not None else None,
        weights=request.weights,
    )


def visits_every_query(wanted: CheckedStatistics) -> bool:
    """Return whether a statistic is wanted that needs the rows of all queries."""
    received = wanted.received or wanted.received_where is not None
    return wanted.lse or received or bool(wanted.mass) or wanted.entropy or wanted.maximum


def named_groups(groups: Mapping[str, Tensor] | None, mass: Tensor | None) -> dict[str, Tensor] | None:
    """Return the mass ``(B, Hq, Nq, groups)`` by the groups' names; None where it is not wanted."""
    if groups is None:
        return None
    return {} if mass is None else dict(zip(groups, mass.unbind(-1), strict=True))


def _tile(request: AttentionRequest, wanted: CheckedStatistics, index: Tensor) -> _Tile:
    logits = row_logits(request, index)
    weights, log_sum = normalized(request.normalize, logits, row_position(request, index))
    received = entropy = maximum = mass = None
    if wanted.received:
        received = weights.sum(-2)
    elif wanted.received_where is not None:
        counted = wanted.received_where[:, index[0]].to(weights.dtype)
        received = (counted[:, None, None, :] @ weights).squeeze(-2)
    if wanted.mass:
        groups = torch.stack([group.expand(request.shape.batch, -1) for group in wanted.mass.values()], dim=-1)
        mass = weights @ groups[:, None].to(weights.dtype)
    if wanted.entropy:
        entropy = row_entropy(request.normalize, logits, weights, log_sum)
    if wanted.maximum:
        maximum = weights.amax(-1) if request.shape.num_keys else torch.zeros_like(log_sum)
    return _Tile(log_sum, received, mass, entropy, maximum)


def _joined(tiles: Sequence[Tensor | None]) -> Tensor | None:
    """Return the per-query tensors of all tiles behind one another; None where they were not asked for."""
    present = [tile for tile in tiles if tile is not None]
    return torch.cat(present, dim=2) if present else None


def _plus(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return term if total is None or term is None else total + term
