"""Gradient of a dense bias: a program sums one tile of it over the samples and heads that share it."""

# Triton's language is not typed Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from vislm.kernels.backends.triton.dense.backward import logit_gradients
from vislm.kernels.backends.triton.dense.tile import (
    broadcast_plane,
    load_log_sum,
    load_tile,
    plane_of,
    product,
    tile_logits,
    tile_weights,
)


@triton.jit
def backward_bias_kernel(
    query,
    key,
    value,
    bias,
    key_logits,
    gradient,
    log_sum,
    delta,
    bias_gradient,
    query_strides,
    key_strides,
    value_strides,
    bias_strides,
    key_logits_strides,
    gradient_strides,
    num_heads,
    group,
    num_queries,
    num_keys,
    scale,
    unit,
    offset,
    gradient_scale,
    bias_heads,
    shared_samples,
    shared_heads,
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
    """Write one tile of ``bias_gradient`` ``(1 or B, 1 or Hq, Nq, Nk)``, contiguous.

    ``bias_heads`` is its second size; each of its planes serves ``shared_samples`` samples and ``shared_heads`` heads.
    """
    row_tiles = tl.cdiv(num_queries, ROWS)
    tile = tl.program_id(0)
    first_query = tile % row_tiles * ROWS
    tile = tile // row_tiles
    column_tiles = tl.cdiv(num_keys, COLUMNS)
    first_key = tile % column_tiles * COLUMNS
    plane = tile // column_tiles
    channel = tl.arange(0, PADDED_DIM)
    value_channel = tl.arange(0, PADDED_VALUE_DIM)
    row = first_query + tl.arange(0, ROWS)
    column = first_key + tl.arange(0, COLUMNS)
    to_bias = tl.zeros((ROWS, COLUMNS), tl.float32)

    for member in range(shared_samples * shared_heads):
        batch = plane // bias_heads * (shared_samples == 1) + member // shared_heads
        head = plane % bias_heads * (shared_heads == 1) + member % shared_heads
        queries = load_tile(
            plane_of(query, query_strides, batch, head), query_strides[2], first_query, num_queries, channel,
            ROWS, DIM, PADDED_DIM,
        )  # fmt: skip
        keys = load_tile(
            plane_of(key, key_strides, batch, head // group), key_strides[2], first_key, num_keys, channel,
            COLUMNS, DIM, PADDED_DIM,
        )  # fmt: skip
        products = product(queries, tl.trans(keys), None, PRECISION)
        logits = tile_logits(
            products, row[:, None], column[None, :], plane_of(bias, bias_strides, batch, head), bias_strides,
            broadcast_plane(key_logits, key_logits_strides, batch, head), num_queries, num_keys, scale, unit, offset,
            CAUSAL, True, SIGMOID,
        )  # fmt: skip
        summed = 0.0
        shared = 0.0
        if not SIGMOID:
            base = tl.cast(batch * num_heads + head, tl.int64) * num_queries
            summed = load_log_sum(log_sum + base, row, num_queries)[:, None]
            shared = tl.load(delta + base + row, mask=row < num_queries, other=0.0)[:, None]
        weights = tile_weights(logits, summed, SIGMOID)
        gradients = load_tile(
            plane_of(gradient, gradient_strides, batch, head), gradient_strides[2], first_query, num_queries,
            value_channel, ROWS, VALUE_DIM, PADDED_VALUE_DIM,
        )  # fmt: skip
        values = load_tile(
            plane_of(value, value_strides, batch, head // group), value_strides[2], first_key, num_keys, value_channel,
            COLUMNS, VALUE_DIM, PADDED_VALUE_DIM,
        )  # fmt: skip
        products = product(gradients, tl.trans(values), None, PRECISION)
        to_bias += logit_gradients(products, weights, shared, SIGMOID)

    place = (tl.cast(plane, tl.int64) * num_queries + row)[:, None] * num_keys + column[None, :]
    inside = (row < num_queries)[:, None] & (column < num_keys)[None, :]
    tl.store(bias_gradient + place, to_bias * gradient_scale, mask=inside)
