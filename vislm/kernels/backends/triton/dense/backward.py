"""Backward kernels of dense and causal attention; each gradient is summed by one program, so the bits repeat.

The weights of a tile are computed anew from the base-2 log-sum-exp. ``delta`` is, per query, the output's gradient
times the output, minus the log-sum-exp's own gradient: a logit's gradient is ``weight * (value . gradient - delta)``.
"""

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
    store_tile,
    tile_logits,
    tile_weights,
    visible_keys,
)


@triton.jit
def delta_kernel(
    output,
    gradient,
    log_sum,
    log_sum_gradient,
    delta,
    output_strides,
    gradient_strides,
    num_heads,
    num_queries,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write ``delta`` ``(B, Hq, Nq)``; ``log_sum_gradient`` (of the natural log-sum-exp) may be None."""
    tiles = tl.cdiv(num_queries, ROWS)
    plane = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * ROWS
    channel = tl.arange(0, PADDED_VALUE_DIM)
    output = plane_of(output, output_strides, plane // num_heads, plane % num_heads)
    gradient = plane_of(gradient, gradient_strides, plane // num_heads, plane % num_heads)
    left = load_tile(output, output_strides[2], first, num_queries, channel, ROWS, VALUE_DIM, PADDED_VALUE_DIM)
    right = load_tile(gradient, gradient_strides[2], first, num_queries, channel, ROWS, VALUE_DIM, PADDED_VALUE_DIM)
    summed = tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    row = first + tl.arange(0, ROWS)
    place = tl.cast(plane, tl.int64) * num_queries + row
    if log_sum_gradient is not None:
        summed -= tl.load(log_sum_gradient + place, mask=row < num_queries, other=0.0)
    seen = tl.load(log_sum + place, mask=row < num_queries, other=0.0) != float("-inf")
    tl.store(delta + place, tl.where(seen, summed, 0.0), mask=row < num_queries)


@triton.jit
def logit_gradients(products, weights, delta, SIGMOID: tl.constexpr):
    """Return the gradient of a tile's logits; ``products`` are the values times the output's gradient."""
    if SIGMOID:
        return weights * (1.0 - weights) * products
    else:
        return weights * (products - delta)


@triton.jit
def backward_keys_kernel(
    query,
    key,
    value,
    bias,
    key_logits,
    gradient,
    log_sum,
    delta,
    key_gradient,
    value_gradient,
    key_logits_gradient,
    query_strides,
    key_strides,
    value_strides,
    bias_strides,
    key_logits_strides,
    gradient_strides,
    key_gradient_strides,
    value_gradient_strides,
    num_heads,
    group,
    num_queries,
    num_keys,
    scale,
    unit,
    offset,
    gradient_scale,
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
    """Write the gradients of one tile of keys and values, and of its key logits per query head.

    A program is ``COLUMNS`` keys of one key head, and visits every query of every query head that shares it. Tiles are
    (keys, queries), so that both products that are summed have their left operand in registers.
    """
    tiles = tl.cdiv(num_keys, COLUMNS)
    first_key = tl.program_id(0) % tiles * COLUMNS
    key_heads = num_heads // group
    batch = tl.program_id(0) // tiles // key_heads
    key_head = tl.program_id(0) // tiles % key_heads
    channel = tl.arange(0, PADDED_DIM)
    value_channel = tl.arange(0, PADDED_VALUE_DIM)
    column = first_key + tl.arange(0, COLUMNS)[:, None]
    keys = load_tile(
        plane_of(key, key_strides, batch, key_head), key_strides[2], first_key, num_keys, channel,
        COLUMNS, DIM, PADDED_DIM,
    )  # fmt: skip
    values = load_tile(
        plane_of(value, value_strides, batch, key_head), value_strides[2], first_key, num_keys, value_channel,
        COLUMNS, VALUE_DIM, PADDED_VALUE_DIM,
    )  # fmt: skip
    to_keys = tl.zeros((COLUMNS, PADDED_DIM), tl.float32)
    to_values = tl.zeros((COLUMNS, PADDED_VALUE_DIM), tl.float32)
    first_query = 0
    if CAUSAL:  # earlier queries see none of these keys
        first_query = tl.maximum(0, first_key - (num_keys - num_queries)) // ROWS * ROWS

    for head in range(key_head * group, key_head * group + group):
        plane = tl.cast(batch * num_heads + head, tl.int64)
        head_query = plane_of(query, query_strides, batch, head)
        head_gradient = plane_of(gradient, gradient_strides, batch, head)
        head_bias = broadcast_plane(bias, bias_strides, batch, head)
        head_key_logits = broadcast_plane(key_logits, key_logits_strides, batch, head)
        to_logits = tl.zeros((COLUMNS,), tl.float32)
        for first in range(first_query, num_queries, ROWS):
            row = first + tl.arange(0, ROWS)
            queries = load_tile(head_query, query_strides[2], first, num_queries, channel, ROWS, DIM, PADDED_DIM)
            products = product(keys, tl.trans(queries), None, PRECISION)
            logits = tile_logits(
                products, row[None, :], column, head_bias, bias_strides, head_key_logits, num_queries, num_keys,
                scale, unit, offset, CAUSAL, True, SIGMOID,
            )  # fmt: skip
            summed = 0.0
            if not SIGMOID:
                summed = load_log_sum(log_sum + plane * num_queries, row, num_queries)[None, :]
            weights = tile_weights(logits, summed, SIGMOID)
            gradients = load_tile(
                head_gradient, gradient_strides[2], first, num_queries, value_channel, ROWS, VALUE_DIM, PADDED_VALUE_DIM
            )
            to_values = product(weights.to(gradients.dtype), gradients, to_values, PRECISION)
            products = product(values, tl.trans(gradients), None, PRECISION)
            shared = 0.0
            if not SIGMOID:
                shared = tl.load(delta + plane * num_queries + row, mask=row < num_queries, other=0.0)[None, :]
            inner = logit_gradients(products, weights, shared, SIGMOID)
            if key_logits_gradient is not None:
                to_logits += tl.sum(inner, 1)
            to_keys = product(inner.to(queries.dtype), queries, to_keys, PRECISION)
        if key_logits_gradient is not None:
            index = first_key + tl.arange(0, COLUMNS)
            tl.store(key_logits_gradient + plane * num_keys + index, to_logits, mask=index < num_keys)

    store_tile(
        plane_of(key_gradient, key_gradient_strides, batch, key_head), key_gradient_strides[2], first_key, num_keys,
        channel, to_keys * gradient_scale, COLUMNS, DIM, PADDED_DIM,
    )  # fmt: skip
    store_tile(
        plane_of(value_gradient, value_gradient_strides, batch, key_head), value_gradient_strides[2], first_key,
        num_keys, value_channel, to_values, COLUMNS, VALUE_DIM, PADDED_VALUE_DIM,
    )  # fmt: skip


@triton.jit
def backward_queries_kernel(
    query,
    key,
    value,
    bias,
    key_logits,
    gradient,
    log_sum,
    delta,
    query_gradient,
    query_strides,
    key_strides,
    value_strides,
    bias_strides,
    key_logits_strides,
    gradient_strides,
    query_gradient_strides,
    num_heads,
    group,
    num_queries,
    num_keys,
    scale,
    unit,
    offset,
    gradient_scale,
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
    """Write the gradient of one tile of ``ROWS`` queries of one head."""
    tiles = tl.cdiv(num_queries, ROWS)
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    batch = plane // num_heads
    head = plane % num_heads
    first_query = tile * ROWS
    key = plane_of(key, key_strides, batch, head // group)
    value = plane_of(value, value_strides, batch, head // group)
    bias = broadcast_plane(bias, bias_strides, batch, head)
    key_logits = broadcast_plane(key_logits, key_logits_strides, batch, head)
    channel = tl.arange(0, PADDED_DIM)
    value_channel = tl.arange(0, PADDED_VALUE_DIM)
    row = first_query + tl.arange(0, ROWS)
    queries = load_tile(
        plane_of(query, query_strides, batch, head), query_strides[2], first_query, num_queries, channel,
        ROWS, DIM, PADDED_DIM,
    )  # fmt: skip
    gradients = load_tile(
        plane_of(gradient, gradient_strides, batch, head), gradient_strides[2], first_query, num_queries, value_channel,
        ROWS, VALUE_DIM, PADDED_VALUE_DIM,
    )  # fmt: skip
    summed = 0.0
    shared = 0.0
    if not SIGMOID:
        base = tl.cast(plane, tl.int64) * num_queries
        summed = load_log_sum(log_sum + base, row, num_queries)[:, None]
        shared = tl.load(delta + base + row, mask=row < num_queries, other=0.0)[:, None]
    to_queries = tl.zeros((ROWS, PADDED_DIM), tl.float32)

    for first in range(0, visible_keys(tile, num_queries, num_keys, ROWS, CAUSAL), COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        keys = load_tile(key, key_strides[2], first, num_keys, channel, COLUMNS, DIM, PADDED_DIM)
        products = product(queries, tl.trans(keys), None, PRECISION)
        logits = tile_logits(
            products, row[:, None], column, bias, bias_strides, key_logits, num_queries, num_keys, scale, unit, offset,
            CAUSAL, True, SIGMOID,
        )  # fmt: skip
        weights = tile_weights(logits, summed, SIGMOID)
        values = load_tile(
            value, value_strides[2], first, num_keys, value_channel, COLUMNS, VALUE_DIM, PADDED_VALUE_DIM
        )
        products = product(gradients, tl.trans(values), None, PRECISION)
        inner = logit_gradients(products, weights, shared, SIGMOID)
        to_queries = product(inner.to(keys.dtype), keys, to_queries, PRECISION)

    store_tile(
        plane_of(query_gradient, query_gradient_strides, batch, head), query_gradient_strides[2], first_query,
        num_queries, channel, to_queries * gradient_scale, ROWS, DIM, PADDED_DIM,
    )  # fmt: skip
