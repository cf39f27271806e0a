"""Output and statistics of all queries in one pass over the rows, a cache-sized piece at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vislm.kernels.bias_rows import additive_range
from vislm.kernels.normalization import normalized, row_entropy
from vislm.kernels.patterns import Causal, Dense
from vislm.kernels.request import AttentionRequest
from vislm.kernels.rows import row_position
from vislm.kernels.scratch import Scratch, scratch_for

CPU_PAIRS = 1 << 19
"""Query-key pairs computed at once by each thread of a CPU, about what its cache holds."""
PAIRS = 1 << 25
"""The same on other devices."""
MAX_ROWS = 128


class Sweep(NamedTuple):
    """What a pass gives: None where not asked for.

    Attributes:
        output: ``(B, Hq, Nq, Dv)``, in the arithmetic's dtype.
        lse: ``(B, Hq, Nq)``.
        entropy: ``(B, Hq, Nq)``.
        maximum: ``(B, Hq, Nq)``.
        mass: ``(B, Hq, Nq, groups)``.
        received: ``(B, Hq, Nk)``.
    """

    output: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    maximum: Tensor | None
    mass: Tensor | None
    received: Tensor | None


@torch.no_grad()
def sweep(request: AttentionRequest) -> Sweep:
    """Return the output (if there is a value) and the statistics wanted that visit every query.

    Any pattern, bias and normalisation; arithmetic in float32 or float64; not differentiable.
    """
    batch, num_heads, num_queries, num_keys, device = request.shape
    wanted, dtype, key_heads = request.statistics, request.dtype, request.key.shape[1]
    attentions, groups = batch * key_heads, num_heads // key_heads
    query = request.query.reshape(attentions, groups, num_queries, request.query.shape[-1])
    key = request.key.flatten(0, 1).to(dtype)
    value = None if request.value is None else request.value.flatten(0, 1).to(dtype)

    def empty(*sizes: int) -> Tensor:
        return torch.zeros(attentions, groups, *sizes, dtype=dtype, device=device)

    members = _members(wanted.mass, attentions, dtype) if wanted.mass else None
    result = Sweep(
        None if value is None else empty(num_queries, value.shape[-1]),
        empty(num_queries) if wanted.lse else None,
        empty(num_queries) if wanted.entropy else None,
        empty(num_queries) if wanted.maximum else None,
        None if members is None else empty(num_queries, members.shape[-1]),
        empty(num_keys) if wanted.received or wanted.received_where is not None else None,
    )
    scratch = scratch_for(request.query, dtype)
    limit = CPU_PAIRS * torch.get_num_threads() if device.type == "cpu" else PAIRS
    rows = max(1, min(MAX_ROWS, num_queries, limit // max(1, groups * num_keys)))
    at_once = max(1, limit // max(1, groups * rows * num_keys))
    for first in range(0, num_queries, rows):
        last = min(first + rows, num_queries)
        index = torch.arange(first, last, device=device)[None]
        position = row_position(request, index)
        # Later keys are not even multiplied.
        seen = max(0, min(num_keys, last + num_keys - num_queries)) if _is_causal(request) else num_keys
        hidden = _hidden(request, first, last, position, seen)
        counts = _counts(request, first, last)
        for head in range(0, attentions, at_once):
            heads = slice(head, min(head + at_once, attentions))
            mine = query[heads, :, first:last].flatten(1, 2).to(dtype)
            logits = torch.bmm(
                mine * request.scale,
                key[heads, :seen].transpose(1, 2),
                out=scratch.take("logits", len(mine), mine.shape[1], seen),
            ).unflatten(1, (groups, -1))
            if hidden is not None:
                logits += _of_heads(hidden, heads, key_heads, groups)
            weights, log_sum = _normalized(request, logits, position, hidden is not None, scratch)
            _record(result, request, logits, weights, log_sum, heads, first, last)
            flat = weights.flatten(1, 2)
            if result.output is not None and value is not None:
                result.output[heads, :, first:last] = torch.bmm(flat, value[heads, :seen]).unflatten(1, (groups, -1))
            if result.mass is not None and members is not None:
                of_heads = members[heads, :seen] if len(members) > 1 else members[:, :seen].expand(len(flat), -1, -1)
                result.mass[heads, :, first:last] = torch.bmm(flat, of_heads).unflatten(1, (groups, -1))
            if result.received is not None:
                received = (
                    weights.sum(2)
                    if counts is None
                    else (counts[_samples(counts, heads, key_heads)] @ weights)[:, :, 0]
                )
                result.received[heads, :, :seen] += received
    return Sweep(*(None if part is None else part.view(batch, num_heads, *part.shape[2:]) for part in result))


def _record(
    result: Sweep,
    request: AttentionRequest,
    logits: Tensor,
    weights: Tensor,
    log_sum: Tensor | None,
    heads: slice,
    first: int,
    last: int,
) -> None:
    """Write the statistics of single rows."""
    largest = None
    if result.maximum is not None or (log_sum is None and (result.lse is not None or result.entropy is not None)):
        largest = weights.amax(-1) if weights.shape[-1] else weights.sum(-1)
    if result.maximum is not None and largest is not None:
        result.maximum[heads, :, first:last] = largest
    if log_sum is None and largest is not None and weights.shape[-1]:
        log_sum = logits.amax(-1) - largest.log()  # the largest weight is exp(largest logit - lse)
    if result.lse is not None and log_sum is not None:
        result.lse[heads, :, first:last] = log_sum
    if result.entropy is not None and log_sum is not None:
        result.entropy[heads, :, first:last] = row_entropy(request.normalize, logits, weights, log_sum)


def _normalized(
    request: AttentionRequest, logits: Tensor, position: Tensor, may_be_blind: bool, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """Return the weights, and the log-sum-exp unless it follows from the weights; logits (x, G, R, Nk)."""
    if request.normalize == "softmax" and not may_be_blind and logits.shape[-1]:
        return torch.softmax(logits, dim=-1, out=scratch.take("weights", *logits.shape)), None
    return normalized(request.normalize, logits, position)


def _is_causal(request: AttentionRequest) -> bool:
    return isinstance(request.pattern, Causal)


def _hidden(request: AttentionRequest, first: int, last: int, position: Tensor, seen: int) -> Tensor | None:
    """Return bias, key logits and mask of some rows, ``(1 or B, 1 or Hq, R, seen)``; None where there is nothing."""
    additive = additive_range(request, first, last, request.dtype)
    if isinstance(request.pattern, Dense):
        return additive
    allowed = request.pattern.mask(position, torch.arange(seen, device=position.device)[None])
    if additive is None:
        additive = torch.zeros((), dtype=request.dtype, device=position.device)
    elif additive.shape[-1] > 1:
        additive = additive[..., :seen]
    return torch.where(allowed, additive, -torch.inf)


def _of_heads(hidden: Tensor, heads: slice, key_heads: int, groups: int) -> Tensor:
    """Return a chunk's part (x, G or 1, R, Nk) of (1 or B, 1 or Hq, R, Nk)."""
    index = torch.arange(heads.start, heads.stop, device=hidden.device)
    sample = index // key_heads if len(hidden) > 1 else torch.zeros_like(index)
    if hidden.shape[1] == 1:
        return hidden[sample]
    return hidden.unflatten(1, (key_heads, groups))[sample, index % key_heads]


def _members(mass: dict[str, Tensor], attentions: int, dtype: torch.dtype) -> Tensor:
    """Return the key groups as ones and zeros, (1 or X, Nk, groups)."""
    batch = max(len(group) for group in mass.values())
    stacked = torch.stack([group.expand(batch, -1) for group in mass.values()], dim=-1).to(dtype)
    return stacked if batch == 1 else stacked.repeat_interleave(attentions // batch, dim=0)


def _counts(request: AttentionRequest, first: int, last: int) -> Tensor | None:
    """Return how much each row counts in ``received``, (1 or B, 1, 1, R); None if all count one."""
    where = request.statistics.received_where
    return None if where is None else where[:, None, None, first:last].to(request.dtype)


def _samples(counts: Tensor, heads: slice, key_heads: int) -> Tensor:
    index = torch.arange(heads.start, heads.stop, device=counts.device)
    return index // key_heads if len(counts) > 1 else torch.zeros_like(index)
