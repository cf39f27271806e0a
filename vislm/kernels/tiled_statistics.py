"""Statistics of an attention from a few query rows at a time: O(N) memory per head, never the N x N matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vislm.kernels.bias_rows import additive_rows, rows
from vislm.kernels.normalization import normalized, row_entropy
from vislm.kernels.patterns import Dense
from vislm.kernels.request import AttentionRequest, CheckedStatistics
from vislm.kernels.statistics import Statistics

MAX_ROWS = 128
MAX_ELEMENTS = 1 << 24

_Result = TypeVar("_Result")


class _Tile(NamedTuple):
    """The statistics of one tile of ``T`` queries; ``mass`` is ``(B, Hq, T, groups)``, ``received`` the tile's sum."""

    lse: Tensor
    received: Tensor | None
    mass: Tensor | None
    entropy: Tensor | None
    maximum: Tensor | None


def tiled_statistics(request: AttentionRequest, output: Tensor | None) -> Statistics:
    """Return the statistics that ``request`` wants.

    All queries are visited in tiles of at most ``MAX_ROWS`` rows and about ``MAX_ELEMENTS`` logits; chosen queries are
    computed alone. Differentiable: in training each tile is recomputed in the backward pass.

    Args:
        request: the validated call.
        output: the attention output ``(B, Hq, Nq, Dv)`` before ``head_scale``; needed for ``output_norm`` only.
    """
    wanted = request.statistics
    tiles: list[_Tile] = []
    received: Tensor | None = None
    if _visits_every_query(wanted):
        everyone = torch.arange(request.shape.num_queries, device=request.shape.device)[None]
        for tile in _visit(request, everyone, lambda index: _tile(request, wanted, index)):
            received = _plus(received, tile.received)
            tiles.append(tile._replace(received=None))  # or the column sums of all tiles would stay alive
    if wanted.received_queries is not None:
        for columns in _visit(request, wanted.received_queries, lambda index: row_weights(request, index).sum(-2)):
            received = _plus(received, columns)
    return Statistics(
        lse=_joined([tile.lse for tile in tiles]) if wanted.lse else None,
        rows=None if wanted.rows is None else row_weights(request, wanted.rows),
        received=received,
        mass=None if wanted.mass is None else _named(wanted.mass, _joined([tile.mass for tile in tiles])),
        entropy=_joined([tile.entropy for tile in tiles]),
        maximum=_joined([tile.maximum for tile in tiles]),
        output_norm=output.to(request.dtype).norm(dim=-1) if wanted.output_norm and output is not None else None,
        weights=request.weights,
    )


def row_logits(request: AttentionRequest, index: Tensor) -> Tensor:
    """Return the logits ``(B, Hq, R, Nk)`` of the queries ``index`` ``(1 or B, R)``, ``-inf`` where not allowed."""
    batch, num_heads, _, num_keys, device = request.shape
    query, key = rows(request.query, index).to(request.dtype), request.key.to(request.dtype)
    # The query heads that share a key head are stacked along the rows, so that keys are never repeated.
    stacked = query.reshape(batch, key.shape[1], num_heads // key.shape[1] * index.shape[1], query.shape[-1])
    logits = (stacked @ key.transpose(-1, -2) * request.scale).view(batch, num_heads, index.shape[1], num_keys)
    additive = additive_rows(request, index, request.dtype)
    if additive is not None:
        logits = logits + additive
    if isinstance(request.pattern, Dense):
        return logits
    return logits.masked_fill(
        ~request.pattern.mask(_position(request, index), torch.arange(num_keys, device=device)[None]), -torch.inf
    )


def row_weights(request: AttentionRequest, index: Tensor) -> Tensor:
    """Return the attention rows ``(B, Hq, R, Nk)`` of the queries ``index`` ``(1 or B, R)``."""
    return normalized(request.normalize, row_logits(request, index), _position(request, index))[0]


def _position(request: AttentionRequest, index: Tensor) -> Tensor:
    """Return the positions (1 or B, 1, R, 1) of queries on the key axis."""
    return (index + request.shape.num_keys - request.shape.num_queries)[:, None, :, None]


def _visits_every_query(wanted: CheckedStatistics) -> bool:
    received = wanted.received or wanted.received_where is not None
    return wanted.lse or received or bool(wanted.mass) or wanted.entropy or wanted.maximum


def _visit(request: AttentionRequest, index: Tensor, compute: Callable[[Tensor], _Result]) -> Iterator[_Result]:
    """Yield ``compute`` of each tile of queries, recomputed in the backward pass instead of kept."""
    logits_per_row = request.shape.batch * request.shape.num_heads * request.shape.num_keys
    rows = max(1, min(MAX_ROWS, MAX_ELEMENTS // max(1, logits_per_row)))
    for tile in index.split(rows, dim=1):
        if request.differentiable:
            yield checkpoint(compute, tile, use_reentrant=False, preserve_rng_state=False)
        else:
            yield compute(tile)


def _tile(request: AttentionRequest, wanted: CheckedStatistics, index: Tensor) -> _Tile:
    logits = row_logits(request, index)
    weights, log_sum = normalized(request.normalize, logits, _position(request, index))
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


def _named(groups: Mapping[str, Tensor], mass: Tensor | None) -> dict[str, Tensor]:
    return {} if mass is None else dict(zip(groups, mass.unbind(-1), strict=True))


def _plus(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return term if total is None or term is None else total + term
