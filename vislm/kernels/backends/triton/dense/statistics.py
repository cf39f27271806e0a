"""Kernels that measure an attention without its matrix: each computes the weights anew from the log-sum-exp."""

# Triton's language is not typed Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from vislm.kernels.backends.triton.dense.tile import (
    broadcast_plane,
    load_log_sum,
    load_tile,
    plane_of,
    product,
    tile_logits,
    tile_weights,
    visible_keys,
)


@triton.jit
def row_statistics_kernel(
    query,
    key,
    bias,
    key_logits,
    log_sum,
    groups,
    mass,
    entropy,
    maximum,
    query_strides,
    key_strides,
    bias_strides,
    key_logits_strides,
    groups_stride,
    num_heads,
    group,
    num_queries,
    num_keys,
    num_planes,
    scale,
    unit,
    offset,
    CAUSAL: tl.constexpr,
    SIGMOID: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write mass per key group ``(G, B, Hq, Nq)``, entropy and maximum ``(B, Hq, Nq)``; any of the three may be None.

    ``groups`` ``(1 or B, Nk)`` holds the groups of a key as the bits of an int32.
    """
    tiles = tl.cdiv(num_queries, ROWS)
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    batch = plane // num_heads
    head = plane % num_heads
    key = plane_of(key, key_strides, batch, head // group)
    bias = broadcast_plane(bias, bias_strides, batch, head)
    key_logits = broadcast_plane(key_logits, key_logits_strides, batch, head)
    channel = tl.arange(0, PADDED_DIM)
    row = tile * ROWS + tl.arange(0, ROWS)
    queries = load_tile(
        plane_of(query, query_strides, batch, head), query_strides[2], tile * ROWS, num_queries, channel,
        ROWS, DIM, PADDED_DIM,
    )  # fmt: skip
    place = tl.cast(plane, tl.int64) * num_queries + row
    summed = 0.0
    if not SIGMOID:
        summed = load_log_sum(log_sum + tl.cast(plane, tl.int64) * num_queries, row, num_queries)[:, None]
    masses = tl.zeros((ROWS, PADDED_GROUPS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    information = tl.zeros((ROWS,), tl.float32)
    largest = tl.zeros((ROWS,), tl.float32)

    for first in range(0, visible_keys(tile, num_queries, num_keys, ROWS, CAUSAL), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        keys = load_tile(key, key_strides[2], first, num_keys, channel, COLUMNS, DIM, PADDED_DIM)
        products = product(queries, tl.trans(keys), None, PRECISION)
        logits = tile_logits(
            products, row[:, None], column[None, :], bias, bias_strides, key_logits, num_queries, num_keys,
            scale, unit, offset, CAUSAL, True, SIGMOID,
        )  # fmt: skip
        weights = tile_weights(logits, summed, SIGMOID)
        if maximum is not None:
            largest = tl.maximum(largest, tl.max(weights, 1))
        if entropy is not None:
            if SIGMOID:
                total += tl.sum(weights, 1)
                logs = tl.log2(tl.where(weights > 0.0, weights, 1.0))
            else:
                logs = tl.where(weights > 0.0, logits - summed, 0.0)
            information += tl.sum(weights * logs, 1)
        if mass is not None:
            member = tl.load(groups + batch * groups_stride + column, mask=column < num_keys, other=0)
            for index in tl.static_range(GROUPS):
                chosen = ((member >> index) & 1)[None, :] == 1
                here = tl.arange(0, PADDED_GROUPS)[None, :] == index
                masses += tl.where(here, tl.sum(tl.where(chosen, weights, 0.0), 1)[:, None], 0.0)

    inside = row < num_queries
    if maximum is not None:
        tl.store(maximum + place, largest, mask=inside)
    if entropy is not None:
        if SIGMOID:  # of the row divided by its sum
            seen = total > 0.0
            total = tl.where(seen, total, 1.0)
            information = tl.where(seen, information / total - tl.log2(total), 0.0)
        tl.store(entropy + place, information * -0.6931471805599453, mask=inside)
    if mass is not None:
        number = tl.arange(0, PADDED_GROUPS)[None, :]
        pointer = mass + tl.cast(number, tl.int64) * num_planes * num_queries + place[:, None]
        tl.store(pointer, masses, mask=inside[:, None] & (number < GROUPS))


@triton.jit
def received_kernel(
    query,
    key,
    bias,
    key_logits,
    log_sum,
    counted,
    received,
    query_strides,
    key_strides,
    bias_strides,
    key_logits_strides,
    counted_stride,
    num_heads,
    group,
    num_queries,
    num_keys,
    scale,
    unit,
    offset,
    CAUSAL: tl.constexpr,
    SIGMOID: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the attention received per key ``(B, Hq, Nk)``, each query times ``counted`` ``(1 or B, Nq)``, None = 1.

    A program is ``COLUMNS`` keys of one query head.
    """
    tiles = tl.cdiv(num_keys, COLUMNS)
    first_key = tl.program_id(0) % tiles * COLUMNS
    plane = tl.program_id(0) // tiles
    batch = plane // num_heads
    head = plane % num_heads
    query = plane_of(query, query_strides, batch, head)
    bias = broadcast_plane(bias, bias_strides, batch, head)
    key_logits = broadcast_plane(key_logits, key_logits_strides, batch, head)
    channel = tl.arange(0, PADDED_DIM)
    column = first_key + tl.arange(0, COLUMNS)
    keys = load_tile(
        plane_of(key, key_strides, batch, head // group), key_strides[2], first_key, num_keys, channel,
        COLUMNS, DIM, PADDED_DIM,
    )  # fmt: skip
    total = tl.zeros((COLUMNS,), tl.float32)
    first_query = 0
    if CAUSAL:
        first_query = tl.maximum(0, first_key - (num_keys - num_queries)) // ROWS * ROWS

    for first in range(first_query, num_queries, ROWS):
        row = first + tl.arange(0, ROWS)
        queries = load_tile(query, query_strides[2], first, num_queries, channel, ROWS, DIM, PADDED_DIM)
        products = product(keys, tl.trans(queries), None, PRECISION)
        logits = tile_logits(
            products, row[None, :], column[:, None], bias, bias_strides, key_logits, num_queries, num_keys,
            scale, unit, offset, CAUSAL, True, SIGMOID,
        )  # fmt: skip
        summed = 0.0
        if not SIGMOID:
            summed = load_log_sum(log_sum + tl.cast(plane, tl.int64) * num_queries, row, num_queries)[None, :]
        weights = tile_weights(logits, summed, SIGMOID)
        if counted is not None:
            factor = tl.load(counted + batch * counted_stride + row, mask=row < num_queries, other=0.0)[None, :]
            weights = tl.where(factor == 0.0, 0.0, weights * factor)
        elif SIGMOID:
            weights = tl.where(row[None, :] < num_queries, weights, 0.0)
        total += tl.sum(weights, 1)

    tl.store(received + tl.cast(plane, tl.int64) * num_keys + column, total, mask=column < num_keys)
