"""From the tokens of a call to the tokens of its tiles and back, and the logits of a few tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vislm.kernels.local.plan import Plan
from vislm.kernels.normalization import Sigmoid
from vislm.kernels.scratch import Scratch
from vislm.kernels.softmax import masked_softmax

CPU_CHUNK_PAIRS = 1 << 17
"""Query-key pairs computed at once by each thread of a CPU, about what its cache holds."""
CHUNK_PAIRS = 1 << 25
"""The same on other devices."""


@dataclass(frozen=True, eq=False)
class Settings:
    """What a local attention needs beside its tensors.

    Attributes:
        plan: the tiles.
        scale: factor of the dot products.
        normalize: as in an :class:`AttentionRequest`.
        origin: index of relative position 0 of the axial logits along each axis.
        may_be_blind: whether a query may see no key at all.
        wants_lse: whether the log-sum-exp is wanted.
        dtype: of the arithmetic.
    """

    plan: Plan
    scale: float
    normalize: Literal["softmax"] | Sigmoid
    origin: tuple[int, ...]
    may_be_blind: bool
    wants_lse: bool
    dtype: torch.dtype


class Tensors(NamedTuple):
    """The tensors of a local attention: ``X = B Hkv`` independent attentions of ``G`` query heads each.

    Attributes:
        query: ``(X, G, Nq, D)``, queries of the grid only.
        key: ``(X, Nk, D)``, with the prefix keys.
        value: ``(X, Nk, Dv)``.
        additive: ``(Hkv or 1, kinds, G or 1, Q, P + S)``, mask and relative bias of each kind of tile.
        key_logits: None or ``(X, G, Nk)``.
        axial: per axis ``(X, G, Nq, offsets)``; none without an axial bias.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    additive: Tensor
    key_logits: Tensor | None
    axial: tuple[Tensor, ...]


class Chunk(NamedTuple):
    """The attentions ``heads`` and the tiles ``tiles``: several attentions only with all their tiles."""

    heads: slice
    tiles: slice


def chunks(tensors: Tensors, plan: Plan) -> Iterator[Chunk]:
    """Yield all tiles of all attentions, as many at a time as are worth one product."""
    attentions, groups = tensors.query.shape[:2]
    (count, queries), keys = plan.queries.shape, plan.keys.shape[1]
    limit = CPU_CHUNK_PAIRS * torch.get_num_threads() if tensors.query.device.type == "cpu" else CHUNK_PAIRS
    tiles_at_once = max(1, limit // (groups * queries * keys))
    heads_at_once = max(1, tiles_at_once // count)
    for head in range(0, attentions, heads_at_once):
        for tile in range(0, count, tiles_at_once):
            yield Chunk(
                slice(head, min(head + heads_at_once, attentions)), slice(tile, min(tile + tiles_at_once, count))
            )


def query_tiles(tensor: Tensor, plan: Plan, scratch: Scratch, name: str) -> Tensor:
    """Return ``(X, T, G, Q, C)`` of a tensor ``(X, G, Nq, C)`` over the grid's queries, in the scratch's dtype."""
    attentions, groups, _, width = tensor.shape
    count, queries = plan.queries.shape
    tiles = scratch.take(name, attentions, count, groups, queries, width)
    rows = tensor.flatten(0, 1)
    if groups == 1 and tensor.dtype == tiles.dtype:
        torch.index_select(rows, 1, plan.queries.flatten(), out=tiles.view(attentions, -1, width))
        return tiles
    gathered = rows.index_select(1, plan.queries.flatten()).view(attentions, groups, count, queries, width)
    return tiles.copy_(gathered.transpose(1, 2))


def from_query_tiles(tiles: Tensor, plan: Plan) -> Tensor:
    """Return ``(X, G, Nq, ...)`` of the tiles ``(X, T, G, Q, ...)``; what repeated queries gave is left out."""
    by_head = tiles.transpose(1, 2).flatten(2, 3)
    return by_head.flatten(0, 1).index_select(1, plan.slot).unflatten(0, by_head.shape[:2])


def of_chunk(tiles: Tensor, chunk: Chunk) -> Tensor:
    """Return a chunk of tiles ``(X, T, G, Q, C)`` as one batch of matrices ``(x t, G Q, C)``."""
    return tiles[chunk.heads, chunk.tiles].flatten(0, 1).flatten(1, 2)


def key_tiles(tensor: Tensor, chunk: Chunk, plan: Plan, scratch: Scratch, name: str) -> Tensor:
    """Return ``(x t, P + S, C)`` of a tensor ``(X, Nk, C)`` over the keys, in the scratch's dtype."""
    index = plan.keys[chunk.tiles]
    count, width = chunk.heads.stop - chunk.heads.start, tensor.shape[-1]
    tiles = scratch.take(name, count * len(index), index.shape[1], width)
    if tensor.dtype != tiles.dtype:
        tiles.copy_(tensor[chunk.heads].index_select(1, index.flatten()).view(tiles.shape))
    elif count == 1:
        torch.index_select(tensor[chunk.heads.start], 0, index.flatten(), out=tiles.view(-1, width))
    else:
        torch.index_select(tensor[chunk.heads], 1, index.flatten(), out=tiles.view(count, -1, width))
    return tiles


def key_index(chunk: Chunk, num_keys: int, plan: Plan) -> Tensor:
    """Return the index ``(x t (P + S),)`` of a chunk's keys among the ``X Nk`` of all attentions."""
    heads = torch.arange(chunk.heads.start, chunk.heads.stop, device=plan.keys.device)
    return (heads[:, None, None] * num_keys + plan.keys[chunk.tiles]).flatten()


def logits_of(
    query: Tensor, key: Tensor, chunk: Chunk, tensors: Tensors, settings: Settings, scratch: Scratch
) -> Tensor:
    """Return the logits ``(x t, G Q, P + S)`` of a chunk's queries ``(x t, G Q, D)`` and keys ``(x t, P + S, D)``."""
    shape = (chunk.heads.stop - chunk.heads.start, chunk.tiles.stop - chunk.tiles.start, tensors.query.shape[1])
    logits = scratch.take("logits", len(query), query.shape[1], key.shape[1])
    _start_with(tensors.additive, logits, shape, chunk, settings.plan)
    logits.baddbmm_(query, key.transpose(1, 2), alpha=settings.scale)
    tiled = logits.view(*shape, -1, logits.shape[-1])
    if tensors.key_logits is not None:
        of_keys = tensors.key_logits[chunk.heads].index_select(2, settings.plan.keys[chunk.tiles].flatten())
        tiled += of_keys.unflatten(2, (shape[1], -1)).transpose(1, 2).unsqueeze(3)
    if tensors.axial:
        entries = [_axial_entries(of_axis, axis, chunk, settings) for axis, of_axis in enumerate(tensors.axial)]
        selector = settings.plan.selector.to(logits.dtype)
        logits.view(-1, logits.shape[-1]).addmm_(torch.cat(entries, dim=-1).flatten(0, -2), selector)
    return logits


def _start_with(additive: Tensor, logits: Tensor, shape: tuple[int, int, int], chunk: Chunk, plan: Plan) -> None:
    """Write the mask and relative bias of a chunk of shape (x, t, G) into its logits (x t, G Q, P + S)."""
    kind = plan.kind[chunk.tiles]
    heads, kinds, groups = additive.shape[:3]
    if shape[0] * shape[2] > 1 or heads * groups > 1:
        head = torch.arange(chunk.heads.start, chunk.heads.stop, device=additive.device) % heads
        group = torch.arange(shape[2], device=additive.device) % groups
        kind = ((head[:, None, None] * kinds + kind[:, None]) * groups + group).flatten()
    table = additive.flatten(0, 2).flatten(1)
    torch.index_select(table, 0, kind, out=logits.view(len(kind), -1))


def axial_index(chunk: Chunk, axis: int, settings: Settings) -> Tensor:
    """Return the index ``(1, t, 1, Q, S_axis)`` of each key's relative position in the axial logits."""
    offset = settings.plan.offsets[axis].index_select(0, settings.plan.kind[chunk.tiles])
    return (offset + settings.origin[axis])[None, :, None]


def _axial_entries(of_axis: Tensor, axis: int, chunk: Chunk, settings: Settings) -> Tensor:
    """Return ``(x, t, G, Q, S_axis)``, the logit of each query and coordinate of its box along one axis."""
    queries = settings.plan.queries[chunk.tiles]
    mine = of_axis[chunk.heads].index_select(2, queries.flatten()).unflatten(2, tuple(queries.shape)).transpose(1, 2)
    mine = mine.to(settings.dtype)
    return mine.gather(-1, axial_index(chunk, axis, settings).expand(*mine.shape[:4], -1))


def weights_of(logits: Tensor, chunk: Chunk, settings: Settings, scratch: Scratch) -> Tensor:
    """Return the weights of a chunk's logits ``(x t, G Q, P + S)``."""
    if settings.normalize == "softmax":
        if settings.may_be_blind:
            return masked_softmax(logits)[0]
        return torch.softmax(logits, dim=-1, out=scratch.take("weights", *logits.shape))
    plan = settings.plan
    position = plan.queries[chunk.tiles] + plan.keys.shape[1] - math.prod(plan.spans)
    rows = logits.view(
        -1, *position.shape[:1], logits.shape[1] // position.shape[1], position.shape[1], logits.shape[2]
    )
    return settings.normalize.weights(rows, position[:, None, :, None]).view_as(logits)


def lse_of(logits: Tensor, weights: Tensor) -> Tensor:
    """Return the log-sum-exp: a row's largest weight is ``exp(largest logit - lse)``; ``-inf`` for blind rows."""
    largest = weights.amax(-1)
    blind = largest == 0
    return (logits.amax(-1) - largest.masked_fill(blind, 1.0).log()).masked_fill_(blind, -torch.inf)
