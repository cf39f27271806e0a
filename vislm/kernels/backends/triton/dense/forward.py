"""Forward kernel of dense and causal attention: output and log-sum-exp in one pass over the keys."""

# Triton's language is not typed Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from vislm.kernels.backends.triton.dense.tile import (
    broadcast_plane,
    load_tile,
    plane_of,
    product,
    store_tile,
    tile_logits,
    tile_weights,
    unmasked_keys,
    visible_keys,
)


@triton.jit
def attended(
    result,
    largest,
    total,
    queries,
    key,
    value,
    bias,
    key_logits,
    begin,
    end,
    row,
    key_strides,
    value_strides,
    bias_strides,
    num_queries,
    num_keys,
    scale,
    unit,
    offset,
    BOUNDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    SIGMOID: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the unnormalised result, the largest logits and the sums after the keys ``begin`` to ``end``."""
    channel = tl.arange(0, PADDED_DIM)
    value_channel = tl.arange(0, PADDED_VALUE_DIM)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        keys = load_tile(key, key_strides[2], first, num_keys, channel, COLUMNS, DIM, PADDED_DIM)
        products = product(queries, tl.trans(keys), None, PRECISION)
        logits = tile_logits(
            products, row, column, bias, bias_strides, key_logits, num_queries, num_keys, scale, unit, offset,
            CAUSAL, BOUNDED, SIGMOID,
        )  # fmt: skip
        if SIGMOID:
            weights = tile_weights(logits, 0.0, True)
        else:
            larger = tl.maximum(largest, tl.max(logits, 1))
            pivot = tl.where(larger == float("-inf"), 0.0, larger)  # rows that have not seen a key yet
            shrink = tl.exp2(largest - pivot)
            weights = tl.exp2(logits - pivot[:, None])
            total = total * shrink + tl.sum(weights, 1)
            result = result * shrink[:, None]
            largest = larger
        values = load_tile(
            value, value_strides[2], first, num_keys, value_channel, COLUMNS, VALUE_DIM, PADDED_VALUE_DIM
        )
        result = product(weights.to(values.dtype), values, result, PRECISION)
    return result, largest, total


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    bias,
    key_logits,
    output,
    log_sum,
    query_strides,
    key_strides,
    value_strides,
    bias_strides,
    key_logits_strides,
    output_strides,
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
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the output ``(B, Hq, Nq, Dv)`` and the base-2 log-sum-exp ``(B, Hq, Nq)`` of one tile of queries.

    A program is one tile of ``ROWS`` queries of one head. With ``SIGMOID`` there is no log-sum-exp to write.
    """
    tiles = tl.cdiv(num_queries, ROWS)
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest rows first
    batch = plane // num_heads
    head = plane % num_heads
    query = plane_of(query, query_strides, batch, head)
    key = plane_of(key, key_strides, batch, head // group)
    value = plane_of(value, value_strides, batch, head // group)
    bias = broadcast_plane(bias, bias_strides, batch, head)
    key_logits = broadcast_plane(key_logits, key_logits_strides, batch, head)

    channel = tl.arange(0, PADDED_DIM)
    value_channel = tl.arange(0, PADDED_VALUE_DIM)
    queries = load_tile(query, query_strides[2], tile * ROWS, num_queries, channel, ROWS, DIM, PADDED_DIM)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, PADDED_VALUE_DIM), tl.float32)

    end = visible_keys(tile, num_queries, num_keys, ROWS, CAUSAL)
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    full = unmasked_keys(tile, num_queries, num_keys, ROWS, COLUMNS, CAUSAL)
    result, largest, total = attended(
        result, largest, total, queries, key, value, bias, key_logits, 0, full, row, key_strides, value_strides,
        bias_strides, num_queries, num_keys, scale, unit, offset, False, False, SIGMOID, DIM, VALUE_DIM, PADDED_DIM,
        PADDED_VALUE_DIM, PRECISION, COLUMNS,
    )  # fmt: skip
    result, largest, total = attended(
        result, largest, total, queries, key, value, bias, key_logits, full, end, row, key_strides, value_strides,
        bias_strides, num_queries, num_keys, scale, unit, offset, True, CAUSAL, SIGMOID, DIM, VALUE_DIM, PADDED_DIM,
        PADDED_VALUE_DIM, PRECISION, COLUMNS,
    )  # fmt: skip

    if not SIGMOID:
        seen = total > 0.0
        result = result / tl.where(seen, total, 1.0)[:, None]
        summed = tl.where(seen, largest + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        index = tile * ROWS + tl.arange(0, ROWS)
        tl.store(log_sum + tl.cast(plane, tl.int64) * num_queries + index, summed, mask=index < num_queries)
    output = plane_of(output, output_strides, batch, head)
    store_tile(
        output, output_strides[2], tile * ROWS, num_queries, value_channel, result, ROWS, VALUE_DIM, PADDED_VALUE_DIM
    )
