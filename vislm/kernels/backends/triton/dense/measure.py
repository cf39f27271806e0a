"""Statistics of a dense call from its log-sum-exp; each is one more pass over queries and keys, without the values."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vislm.kernels.backends.triton.dense.call import Call, Operands, shared_arguments, start, tile_of
from vislm.kernels.backends.triton.dense.statistics import received_kernel, row_statistics_kernel
from vislm.kernels.request import CheckedStatistics

MAX_GROUPS = 8


def row_statistics(
    call: Call, operands: Operands, log_sum: Tensor, wanted: CheckedStatistics
) -> tuple[dict[str, Tensor] | None, Tensor | None, Tensor | None]:
    """Return mass per key group, entropy and maximum, each ``(B, Hq, Nq)`` or None if not wanted."""
    shape = operands.query.shape[:3]
    entropy = log_sum.new_empty(shape) if wanted.entropy else None
    maximum = log_sum.new_empty(shape) if wanted.maximum else None
    names = list(wanted.mass or {})
    masses: dict[str, Tensor] = {}
    first = 0
    while first < len(names) or (first == 0 and (wanted.entropy or wanted.maximum)):
        here = names[first : first + MAX_GROUPS]
        mass = log_sum.new_empty(len(here), *shape) if here else None
        groups = _bits([wanted.mass[name] for name in here]) if here and wanted.mass else None
        once = first == 0
        _measure(call, operands, log_sum, groups, mass, entropy if once else None, maximum if once else None)
        masses |= {} if mass is None else dict(zip(here, mass.unbind(0), strict=True))
        first += MAX_GROUPS
    return (None if wanted.mass is None else masses), entropy, maximum


def received_by_keys(call: Call, operands: Operands, log_sum: Tensor, counted: Tensor | None) -> Tensor:
    """Return the attention received per key ``(B, Hq, Nk)``.

    Args:
        call: the call.
        operands: its tensors.
        log_sum: base-2 log-sum-exp ``(B, Hq, Nq)``.
        counted: factor of each query ``(1 or B, Nq)``, or whether it counts; None = 1.
    """
    batch, num_heads = operands.query.shape[:2]
    num_keys = operands.key.shape[2]
    received = log_sum.new_empty(batch, num_heads, num_keys)
    if counted is not None:
        counted = counted.float().contiguous()
    tile = tile_of("received", operands)
    arguments = shared_arguments(call, operands) | {
        "log_sum": log_sum,
        "counted": counted,
        "received": received,
        "counted_stride": 0 if counted is None or len(counted) == 1 else counted.stride(0),
    }
    start(received_kernel, batch * num_heads * triton.cdiv(num_keys, tile.columns), tile, arguments)
    return received


def _measure(
    call: Call,
    operands: Operands,
    log_sum: Tensor,
    groups: Tensor | None,
    mass: Tensor | None,
    entropy: Tensor | None,
    maximum: Tensor | None,
) -> None:
    batch, num_heads, num_queries, _ = operands.query.shape
    tile = tile_of("row_statistics", operands)
    count = 0 if mass is None else len(mass)
    arguments = shared_arguments(call, operands) | {
        "log_sum": log_sum,
        "groups": groups,
        "mass": mass,
        "entropy": entropy,
        "maximum": maximum,
        "groups_stride": 0 if groups is None or len(groups) == 1 else groups.stride(0),
        "num_planes": batch * num_heads,
        "GROUPS": count,
        "PADDED_GROUPS": triton.next_power_of_2(max(1, count)),
    }
    start(row_statistics_kernel, batch * num_heads * triton.cdiv(num_queries, tile.rows), tile, arguments)


def _bits(groups: list[Tensor]) -> Tensor:
    """Return the key groups, each bool (1 or B, Nk), as the bits of one int32 (1 or B, Nk)."""
    bits = torch.zeros((), dtype=torch.int32, device=groups[0].device)
    for index, group in enumerate(groups):
        bits = bits | (group.to(torch.int32) << index)
    return bits.contiguous()
