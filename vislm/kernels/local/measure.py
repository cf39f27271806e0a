"""Statistics of every query of a grid, tile by tile: time and memory O(N), as the attention itself."""

from __future__ import annotations

import torch
from torch import Tensor

from vislm.kernels.local.run import prepared
from vislm.kernels.local.tiles import (
    Chunk,
    Settings,
    Tensors,
    chunks,
    from_query_tiles,
    key_tiles,
    logits_of,
    lse_of,
    of_chunk,
    query_tiles,
    weights_of,
)
from vislm.kernels.normalization import row_entropy
from vislm.kernels.request import AttentionRequest
from vislm.kernels.scratch import scratch_for
from vislm.kernels.statistics import Statistics


@torch.no_grad()
def local_statistics(request: AttentionRequest) -> Statistics:
    """Return the statistics of the grid's queries that visit all of them, as far as ``request`` wants them.

    Not differentiable; without ``rows``, ``received`` of chosen query indices, and ``output_norm``.
    """
    wanted = request.statistics
    settings, tensors = prepared(request, request.key[..., :0], wants_lse=False)
    plan = settings.plan
    scratch = scratch_for(tensors.query, settings.dtype)
    query = query_tiles(tensors.query, plan, scratch, "query")
    shape = query.shape[:-1]
    by_row = {
        name: query.new_empty(shape, dtype=settings.dtype)
        for name in ("lse", "entropy", "maximum")
        if getattr(wanted, name)
    }
    groups = _groups(wanted.mass, tensors) if wanted.mass else None
    mass = None if groups is None else query.new_empty(*shape, groups.shape[-1], dtype=settings.dtype)
    counts = _counts(request, tensors, settings)
    received = None if counts is None else query.new_zeros(*tensors.query.shape[:2], request.shape.num_keys)
    received = None if received is None else received.to(settings.dtype)
    for chunk in chunks(tensors, plan):
        key = key_tiles(tensors.key, chunk, plan, scratch, "key")
        logits = logits_of(of_chunk(query, chunk), key, chunk, tensors, settings, scratch)
        weights = weights_of(logits, chunk, settings, scratch)
        for name, rows in by_row.items():
            place = rows[chunk.heads, chunk.tiles]
            place.copy_(_row_statistic(name, logits, weights, settings).view(place.shape))
        if mass is not None and groups is not None:
            place = mass[chunk.heads, chunk.tiles]
            place.copy_((weights @ key_tiles(groups, chunk, plan, scratch, "members")).view(place.shape))
        if received is not None and counts is not None:
            _receive(received, weights, counts, chunk, settings)
    batch, num_heads = request.shape[:2]

    def heads(tiles: Tensor) -> Tensor:
        rows = from_query_tiles(tiles, plan)
        return rows.reshape(batch, num_heads, *rows.shape[2:])

    return Statistics(
        **{name: heads(rows) for name, rows in by_row.items()},
        mass=None if mass is None else dict(zip(wanted.mass or (), heads(mass).unbind(-1), strict=True)),
        received=None if received is None else received.reshape(batch, num_heads, -1),
        weights=request.weights,
    )


def _row_statistic(name: str, logits: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    if name == "maximum":
        return weights.amax(-1)
    if settings.normalize == "softmax":
        sums = lse_of(logits, weights)
        return sums if name == "lse" else row_entropy("softmax", logits, weights, sums)
    return row_entropy(settings.normalize, logits, weights, weights.sum(-1).log())


def _groups(mass: dict[str, Tensor], tensors: Tensors) -> Tensor:
    """Return the key groups as ones and zeros, (X, Nk, groups)."""
    attentions, num_keys = tensors.key.shape[:2]
    groups = torch.stack([group.expand(_batch_of(mass), num_keys) for group in mass.values()], dim=-1)
    repeats = attentions // len(groups)
    return groups.to(tensors.additive.dtype).repeat_interleave(repeats, dim=0)


def _batch_of(mass: dict[str, Tensor]) -> int:
    return max(len(group) for group in mass.values())


def _counts(request: AttentionRequest, tensors: Tensors, settings: Settings) -> Tensor | None:
    """Return how much each query counts in ``received``, (1 or X, T, 1, Q); None if that is not wanted."""
    wanted, plan = request.statistics, settings.plan
    real = plan.real.to(settings.dtype)[None, :, None]
    if wanted.received:
        return real
    if wanted.received_where is None:
        return None
    where = wanted.received_where[:, -len(plan.slot) :].to(settings.dtype)
    where = where.repeat_interleave(len(tensors.query) // len(where), dim=0)
    return (
        where[:, None].index_select(2, plan.queries.flatten()).unflatten(2, tuple(plan.queries.shape)).transpose(1, 2)
        * real
    )


def _receive(received: Tensor, weights: Tensor, counts: Tensor, chunk: Chunk, settings: Settings) -> None:
    """Add the attention that a chunk's keys receive from its queries."""
    plan = settings.plan
    queries = plan.queries.shape[1]
    tiled = weights.unflatten(1, (-1, queries))
    heads = chunk.heads if len(counts) > 1 else slice(0, 1)
    mine = counts[heads, chunk.tiles].expand(chunk.heads.stop - chunk.heads.start, -1, -1, -1).flatten(0, 1)
    sums = (mine[:, :, None].expand(-1, tiled.shape[1], -1, -1) @ tiled).squeeze(2)
    received[chunk.heads].index_add_(
        2,
        plan.keys[chunk.tiles].flatten(),
        sums.unflatten(0, (-1, len(plan.keys[chunk.tiles]))).transpose(1, 2).flatten(2),
    )
