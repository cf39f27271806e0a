"""ALiBi: a penalty that grows linearly with the distance to the key, as one to four channels."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vislm.errors import UnknownName, UsageError
from vislm.kernels.bias import LowRankBias

SlopeRule = Literal["interpolated", "geometric"]

_BASE = 256
"""Positions are written in this base; all its digits are exact in bfloat16."""
_MAX_SPLIT = _BASE**2
"""Beyond two digits ``slope * position`` no longer fits the 24 bits of a float32 sum."""


def alibi_slopes(
    num_heads: int, *, rule: SlopeRule = "interpolated", device: torch.device | str | None = None
) -> Tensor:
    """Return ALiBi's slope per head, float32 ``(H,)``.

    For a power of two both rules give ``2^(-8 (h + 1) / H)``. Otherwise

    - ``"interpolated"`` (ALiBi's own): the slopes of the largest power of two ``P < H``, then every second slope of
      ``2 P``, from its first on;
    - ``"geometric"`` (FlashBias' release): the same formula for every ``H``.
    """
    if num_heads < 1:
        raise UsageError(f"{num_heads=}, expected at least one head")
    if rule not in get_args(SlopeRule):
        raise UnknownName("slope rule", str(rule), get_args(SlopeRule))
    whole = num_heads if rule == "geometric" else 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(whole) + _geometric(2 * whole)[::2][: num_heads - whole]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def _geometric(count: int) -> list[float]:
    return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]


def alibi_bias(
    slopes: Tensor,
    num_queries: int,
    num_keys: int | None = None,
    *,
    softmax_only: bool = False,
    split: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LowRankBias:
    """Return ALiBi ``slope_h (j - i)`` in factors; older keys are penalised, by head.

    Queries are aligned to the end of the keys: query ``i`` of ``Nq`` stands at ``i + Nk - Nq``.

    ==================  =====================================================  ====
    form                query factor | key factor                              rank
    ==================  =====================================================  ====
    default             ``s [1, -i]``              | ``[j, 1]``                 2
    softmax only        ``s``                      | ``j``                      1
    split               ``[256 s, s, -i1, -i0]``   | ``[j1, j0, 256 s, s]``     4
    split, softmax only ``[256 s, s]``             | ``[j1, j0]``               2
    ==================  =====================================================  ====

    Args:
        slopes: ``(H,)``, see :func:`alibi_slopes`; may require gradients. Negative slopes reward distance, which is the
            sign that FlashBias' paper and release use.
        num_queries: ``Nq``.
        num_keys: ``Nk``, None = ``Nq``.
        softmax_only: drop what is constant along a row. Exact for softmax, wrong for sigmoid attention.
        split: write positions in base 256 (``j = 256 j1 + j0``) and round the slopes to bfloat16. Every channel is
            then exact in float16 and bfloat16, and the bias exact when their products are summed in float32, as matrix
            units do. For up to 65536 keys.
        dtype: of the factors.

    Raises:
        UsageError: slopes that are not ``(H,)``, or positions that ``dtype`` cannot hold without rounding.
    """
    num_keys = num_queries if num_keys is None else num_keys
    _check(slopes, num_queries, num_keys, split, dtype)
    key = torch.arange(num_keys, device=slopes.device)
    query = torch.arange(num_queries, device=slopes.device) + num_keys - num_queries
    if split:
        # The rounding is invisible to autograd: a slope that learns gets its full-precision gradient.
        rounded = slopes + (slopes.to(torch.bfloat16).to(slopes.dtype) - slopes).detach()
        slope = rounded.to(dtype)[:, None, None] * torch.tensor([_BASE, 1.0], dtype=dtype, device=slopes.device)
        key_channels, query_channels = _digits(key).to(dtype), -_digits(query).to(dtype)
        own_query, own_key = query_channels, slope
    else:
        slope = slopes.to(dtype)[:, None, None]
        key_channels = key[:, None].to(dtype)
        own_query, own_key = -slope * query[:, None].to(dtype), torch.ones_like(slope[:1])
    if softmax_only:
        return _paired([slope], [key_channels], num_queries, num_keys)
    return _paired([slope, own_query], [key_channels, own_key], num_queries, num_keys)


def _paired(query: list[Tensor], key: list[Tensor], num_queries: int, num_keys: int) -> LowRankBias:
    """Join channels (1 or H, 1 or N, R) along R after giving them the same heads and all tokens."""
    return LowRankBias(_joined(query, num_queries)[None], _joined(key, num_keys)[None])


def _joined(channels: list[Tensor], tokens: int) -> Tensor:
    heads = max(len(part) if part.ndim == 3 else 1 for part in channels)
    return torch.cat([part.expand(heads, tokens, -1) for part in channels], dim=-1)


def _digits(position: Tensor) -> Tensor:
    """Return the two base-256 digits ``(N, 2)``, high one first, the low one non-negative."""
    high = position.div(_BASE, rounding_mode="floor")
    return torch.stack([high, position - _BASE * high], dim=-1)


def _check(slopes: Tensor, num_queries: int, num_keys: int, split: bool, dtype: torch.dtype) -> None:
    if not isinstance(slopes, Tensor) or slopes.ndim != 1 or not slopes.is_floating_point():
        given = f"{slopes.dtype} {tuple(slopes.shape)}" if isinstance(slopes, Tensor) else repr(slopes)
        raise UsageError(f"slopes is {given}, expected floating-point (H,), such as alibi_slopes(num_heads)")
    if num_queries < 1 or num_keys < 1:
        raise UsageError(f"{num_queries=}, {num_keys=}, expected at least one of each")
    if not dtype.is_floating_point:
        raise UsageError(f"{dtype=}, expected a floating-point dtype")
    largest = max(num_keys, num_queries)
    if split and largest > _MAX_SPLIT:
        raise UsageError(f"{largest} tokens, but split=True is exact for up to {_MAX_SPLIT}; use dtype=torch.float32")
    exact = 2 / torch.finfo(dtype).eps  # the integers up to here have no gaps
    if not split and largest - 1 > exact:
        raise UsageError(
            f"positions up to {largest - 1} are not exact in {dtype}, which holds integers up to {exact:.0f}; "
            "use split=True or dtype=torch.float32"
        )
