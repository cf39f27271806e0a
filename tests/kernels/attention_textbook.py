"""The attention of the papers, written out: windows by loops over positions, logits and weights by whole matrices.

Nothing here is derived from the package. Every step of :func:`textbook` keeps the dtype of its tensors, so that it is
both the exact result (in float64) and the plain computation of the same precision, whose error is the yardstick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

Axis = tuple[list[int], int, int]
"""What a query sees along one axis: key coordinates, where the query itself stands, distance of neighbouring keys."""


def neighborhood_axis(
    size: int, position: int, *, window: int, stride: int, dilation: int, causal: bool, border: str
) -> Axis:
    group, query = position % dilation, position // dilation
    members = [key for key in range(size) if key % dilation == group]
    last = len(members) - 1
    if causal:
        leader = min(query // stride * stride + stride - 1, last)
        chosen = range(max(leader - (window - 1), 0), query + 1)
    else:
        leader = min(query // stride * stride + stride // 2, last)
        start = leader - window // 2
        if border == "shift":
            start = min(max(start, 0), len(members) - window)
        chosen = range(start, start + window)
    return [members[index] for index in chosen if 0 <= index <= last], position, dilation


def blocked_axis(size: int, position: int, *, block: int, halo: int, query_stride: int, border: str) -> Axis:
    queries_per_block = block // query_stride
    start = position // queries_per_block * block
    keys = list(range(start - halo, start + block + halo))
    if border == "mask":
        keys = [key for key in keys if 0 <= key < size]
    return keys, start + position % queries_per_block, 1


def window_axis(size: int, position: int, *, window: int, shift: int) -> Axis:
    number = (position - shift) // window
    return [key for key in range(size) if (key - shift) // window == number], position, 1


@dataclass(frozen=True)
class Layout:
    """Which pairs of tokens attend, with the zero keys around a zero border among the keys.

    ``allowed`` is ``(1 or B, 1, Nq, Nk)``; ``offsets`` holds per axis of a grid the relative position ``(Nq, Nk)`` in
    steps where ``patches`` is True, which says that both are patches and attend; ``real`` ``(Nk,)`` is False for zero
    keys.
    """

    allowed: Tensor
    offsets: tuple[Tensor, ...] = ()
    patches: Tensor | None = None
    real: Tensor | None = None


def grid_layout(
    grid: tuple[int, ...],
    query_grid: tuple[int, ...],
    margin: tuple[int, ...],
    prefix: tuple[int, int],
    axis_rule: Callable[[int, int], Axis],
) -> Layout:
    """Return the layout of a grid; ``prefix`` = numbers of prefix queries and prefix keys."""
    queries: list[tuple[int, ...] | None] = [None] * prefix[0]
    queries += product(*(range(size) for size in query_grid))
    keys: list[tuple[int, ...] | None] = [None] * prefix[1]
    keys += product(*(range(-extra, size + extra) for size, extra in zip(grid, margin, strict=True)))
    shape = (len(queries), len(keys))
    allowed, patches = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    offsets = tuple(torch.zeros(shape, dtype=torch.long) for _ in grid)
    rules = {(axis, place): axis_rule(axis, place) for axis, size in enumerate(query_grid) for place in range(size)}
    for (i, query), (j, key) in product(enumerate(queries), enumerate(keys)):
        if query is None or key is None:
            allowed[i, j] = key is None or all(0 <= place < size for place, size in zip(key, grid, strict=True))
            continue
        seen = [rules[axis, place] for axis, place in enumerate(query)]
        if all(place in chosen for place, (chosen, _, _) in zip(key, seen, strict=True)):
            allowed[i, j] = patches[i, j] = True
            for axis, (_, anchor, step) in enumerate(seen):
                assert (key[axis] - anchor) % step == 0
                offsets[axis][i, j] = (key[axis] - anchor) // step
    inside = [key is None or all(0 <= k < n for k, n in zip(key, grid, strict=True)) for key in keys]
    return Layout(allowed[None, None], offsets, patches, torch.tensor(inside))


@dataclass(frozen=True)
class Result:
    """``output`` ``(B, Hq, Nq, Dv)``, ``weights`` ``(B, Hq, Nq, Nk)``, ``lse`` ``(B, Hq, Nq)`` (None for sigmoid)."""

    output: Tensor
    weights: Tensor
    lse: Tensor | None


def textbook(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    additive: Tensor | None = None,
    *,
    scale: float | None = None,
    sigmoid: Mapping[str, Any] | None = None,
) -> Result:
    """Return attention over ``layout``; key, value and additive logits ``(.., Nk)`` are those of the real keys."""
    groups = query.shape[1] // key.shape[1]
    key, value = spread(key, layout, 2), spread(value, layout, 2)
    logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2)
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    if additive is not None:
        logits = logits + additive
    logits = logits.masked_fill(~layout.allowed, -torch.inf)
    weights, lse = _softmax(logits) if sigmoid is None else (_sigmoid(logits, layout, **sigmoid), None)
    return Result(weights @ value.repeat_interleave(groups, 1), weights, lse)


def spread(tensor: Tensor, layout: Layout, axis: int) -> Tensor:
    """Return the tensor of real keys with zeros for the zero keys."""
    if layout.real is None or bool(layout.real.all()):
        return tensor
    moved = tensor.movedim(axis, -1)
    wide = moved.new_zeros(*moved.shape[:-1], len(layout.real))
    return wide.index_copy(-1, layout.real.nonzero().squeeze(1), moved).movedim(-1, axis)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(blind, 0.0)
    weights = torch.softmax(logits, -1).masked_fill(blind, 0.0)
    return weights, torch.logsumexp(logits, -1).masked_fill(blind.squeeze(-1), -torch.inf)


def _sigmoid(
    logits: Tensor, layout: Layout, bias: float | None = None, temperature: float = 0.0, row_norm: str | None = None
) -> Tensor:
    num_queries = logits.shape[-2]
    real = logits.shape[-1] if layout.real is None else int(layout.real.sum())
    bias = -math.log(real) if bias is None else bias
    weights = torch.sigmoid(logits * math.exp(temperature) + bias)
    if row_norm is None:
        return weights
    position = torch.arange(num_queries) + real - num_queries
    length = (position + 1).clamp_min(1).to(logits.dtype)[:, None]
    return weights / (length if row_norm == "length" else length.sqrt())


def measure(wanted: Any, result: Result, layout: Layout | None = None) -> dict[str, Tensor]:
    """Return every statistic that ``wanted`` (a ``StatisticsRequest``) asks for, mass groups as ``mass.name``."""
    full = result.weights
    batch, _, num_queries, _ = full.shape
    weights = full if layout is None or layout.real is None else full[..., layout.real]
    found: dict[str, Tensor] = {}
    if wanted.lse:
        assert result.lse is not None
        found["lse"] = result.lse
    if wanted.rows is not None:
        found["rows"] = weights[:, :, list(wanted.rows)]
    if isinstance(wanted.received, Tensor):
        counts = torch.zeros(batch, num_queries)
        if wanted.received.dtype == torch.bool:
            counts += wanted.received
        else:
            for sample in range(batch):
                for index in wanted.received.expand(batch, -1)[sample].tolist():
                    counts[sample, index] += 1
        found["received"] = (weights * counts.to(weights.dtype)[:, None, :, None]).sum(-2)
    elif wanted.received:
        found["received"] = weights.sum(-2)
    for name, group in (wanted.mass or {}).items():
        found[f"mass.{name}"] = (weights * group.expand(batch, -1)[:, None, None]).sum(-1)
    if wanted.entropy:
        total = full.sum(-1, keepdim=True)
        share = full / total.masked_fill(total == 0, 1.0) if result.lse is None else full
        found["entropy"] = -(share * share.masked_fill(share == 0, 1.0).log()).sum(-1)
    if wanted.maximum:
        found["maximum"] = full.amax(-1)
    if wanted.output_norm:
        found["output_norm"] = torch.linalg.vector_norm(result.output, dim=-1)
    return found
