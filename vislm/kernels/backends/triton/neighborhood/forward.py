"""The forward kernel of fused neighborhood attention: one program per tile of queries and head.

Nothing here has run on a GPU yet: it is tested under Triton's interpreter and compiled ahead of time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vislm.kernels.backends.triton.dense.tile import product
from vislm.kernels.backends.triton.neighborhood.device import (
    LN2,
    load_rows,
    logits_block,
    moved,
    plane,
    spans_at,
    store_rows,
    tile_row,
    token_at,
    unravelled,
)


@triton.jit
def neighborhood_forward(
    query, key, value, table, axial, key_logits, tiles, spans, output, lse,
    query_strides, key_strides, value_strides, logits_strides, output_strides,
    table_steps, table_size, axial_sizes, origins, query_steps, key_steps,
    num_tiles, num_heads, group_size, num_queries, scale,
    AXES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store output and log-sum-exp of a tile of queries: online softmax over the box of keys that the tile sees.

    Strides are those of batch, head and token; channels are contiguous, log-sum-exp ``(B, Hq, Nq)`` and axial logits
    ``(B, Hq, Nq, size)`` wholly. ``table_steps`` are those of the table's first two axes and its head; ``scale`` comes
    with ``log2(e)``. Query head h uses key head ``h // group_size``.
    """
    program = tl.program_id(0)
    batch, head = program // num_tiles // num_heads, program // num_tiles % num_heads
    rows, query_counts, key_start, key_counts, first_query, first_key = tile_row(tiles, program % num_tiles)
    num_own = query_counts[0] * query_counts[1] * query_counts[2]
    num_other = key_counts[0] * key_counts[1] * key_counts[2]

    own = tl.arange(0, BLOCK_M)
    inside = own < num_own
    query_place = unravelled(tl.minimum(own, num_own - 1), query_counts)
    query_tokens = token_at(first_query, query_place, query_steps)
    query_spans = spans_at(spans, rows, query_place)
    query_row = (program // num_tiles).to(tl.int64) * num_queries + query_tokens
    queries = load_rows(plane(query, query_strides, batch, head), query_tokens, query_strides[2], HEAD_DIM, BLOCK_D)
    key = plane(key, key_strides, batch, head // group_size)
    value = plane(value, value_strides, batch, head // group_size)
    if table is not None:
        table += head * table_steps[2]
    if key_logits is not None:
        key_logits = plane(key_logits, logits_strides, batch, head)

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, num_other, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        key_place = unravelled(tl.minimum(other, num_other - 1), key_counts)
        key_tokens = token_at(first_key, key_place, key_steps)
        keys = load_rows(key, key_tokens, key_strides[2], HEAD_DIM, BLOCK_D)
        logits = logits_block(
            product(queries, tl.trans(keys), None, PRECISION), inside, other < num_other, query_spans,
            moved(key_place, key_start), scale, table, table_steps, table_size, axial, query_row, axial_sizes, origins,
            key_logits, key_tokens, AXES, MASKED,
        )  # fmt: skip
        larger = tl.maximum(largest, tl.max(logits, 1))
        pivot = tl.where(larger == float("-inf"), 0.0, larger)  # a row that has seen nothing yet
        weights = tl.exp2(logits - pivot[:, None])
        shrink = tl.exp2(largest - pivot)
        total = total * shrink + tl.sum(weights, 1)
        values = load_rows(value, key_tokens, value_strides[2], VALUE_DIM, BLOCK_V)
        result = product(weights.to(values.dtype), values, result * shrink[:, None], PRECISION)
        largest = larger

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    tl.store(lse + query_row, tl.where(blind, float("-inf"), (largest + tl.log2(total)) * LN2), mask=inside)
    output = plane(output, output_strides, batch, head)
    store_rows(output, query_tokens, output_strides[2], result / total[:, None], inside, VALUE_DIM, BLOCK_V)
