"""Attention of the (token, head) pairs in use only: the others cost nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from vislm.kernels import attend

BINS = 16
"""Rows run together when their numbers of active queries, in shares of this of all, round up alike."""
LEAST_KEYS_SPARED = 128
"""Keys that a query of the average head must be spared before gathering the active queries pays."""


def attend_active(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, *, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """Return the output ``(B, H, N, Dv)`` of the active pairs of token and head.

    The first heads are used by all tokens. Of each of the last ones, the queries of the tokens that keep it are
    gathered, those of heads with similarly many together, and attend to all keys: work and gradients are those of the
    active pairs, plus the padding inside a group, at most a ``1 / BINS`` share of all pairs. The output of the other
    pairs is zero, or what it would be if they were active.

    Args:
        query: ``(B, H, N, D)``.
        key: ``(B, H, Nk, D)``.
        value: ``(B, H, Nk, Dv)``.
        kept: bool ``(B, N, E)``, for the last E heads.
        scale: factor of the dot products, None = ``D ** -0.5``.
        bias: additive logits ``(H, N, Nk)``.
    """
    shared = query.shape[1] - kept.shape[2]
    (q, routed_q), (k, routed_k), (v, routed_v) = (
        (part[:, :shared], part[:, shared:].flatten(0, 1)) for part in (query, key, value)
    )
    routed = _of_kept(routed_q, routed_k, routed_v, kept, scale, None if bias is None else bias[shared:])
    if shared == 0:
        return routed
    everyone = attend(q, k, v, scale=scale, bias=None if bias is None else bias[None, :shared])
    return torch.cat((everyone, routed), dim=1)


def skipping_pays(num_keys: int, num_heads: int, used_heads: int) -> bool:
    """Return whether :func:`attend_active` is likely to be faster than all pairs; never while a graph is captured.

    Which pairs are active is known only when the model runs, which no captured graph could take into account.

    Args:
        num_keys: keys that each query sees.
        num_heads: H.
        used_heads: heads that each token uses.
    """
    spared = num_keys * (num_heads - used_heads) / num_heads
    return not torch.compiler.is_compiling() and spared >= LEAST_KEYS_SPARED


def _of_kept(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, scale: float | None, bias: Tensor | None
) -> Tensor:
    """Return the output ``(B, E, N, Dv)`` of rows ``(B E, N or Nk, D)``."""
    rows, tokens = kept.transpose(1, 2).flatten(0, 1), kept.shape[1]
    counts = rows.sum(dim=1)
    order = rows.argsort(dim=1, descending=True, stable=True)
    shares = (counts * BINS + tokens - 1) // tokens
    out = value.new_zeros(len(rows) * tokens, value.shape[-1])
    for share in shares.unique().tolist():
        if share == 0:
            continue
        members = (shares == share).nonzero()[:, 0]
        chosen = order[members, : int(counts[members].max())]
        place = (members[:, None] * tokens + chosen).flatten()
        queries = query.flatten(0, 1).index_select(0, place).unflatten(0, chosen.shape)
        keys, values = key.index_select(0, members), value.index_select(0, members)
        logits = None
        if bias is not None:
            own = (members[:, None] % kept.shape[2] * tokens + chosen).flatten()
            logits = bias.flatten(0, 1).index_select(0, own).unflatten(0, (1, *chosen.shape))
        attended = attend(queries[None], keys[None], values[None], scale=scale, bias=logits)
        out = out.index_copy(0, place, attended.flatten(0, 2).to(out.dtype))
    return out.unflatten(0, (kept.shape[0], kept.shape[2], tokens))
