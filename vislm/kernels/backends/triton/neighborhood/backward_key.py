"""The backward kernel of fused neighborhood attention for keys and values: one program per tile of keys and key head.

Nothing here has run on a GPU yet: it is tested under Triton's interpreter and compiled ahead of time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vislm.kernels.backends.triton.dense.tile import product
from vislm.kernels.backends.triton.neighborhood.device import (
    LOG2E,
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
def neighborhood_backward_key(
    query, key, value, table, axial, key_logits, tiles, spans, lse, grad_output, delta,
    grad_key, grad_value, grad_key_logits,
    query_strides, key_strides, value_strides, logits_strides, grad_output_strides,
    grad_key_strides, grad_value_strides,
    table_steps, table_size, axial_sizes, origins, query_steps, key_steps,
    num_tiles, num_heads, group_size, num_queries, num_keys, scale, factor,
    AXES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile of keys and values: over all queries of the group's heads that see one of them.

    Arguments as in :func:`neighborhood_forward`, with tiles of keys, and ``delta`` as stored by
    :func:`neighborhood_backward_query`. ``grad_key_logits`` is None or float32 ``(B, Hq, num_keys)``.
    """
    program = tl.program_id(0)
    num_key_heads = num_heads // group_size
    batch, key_head = program // num_tiles // num_key_heads, program // num_tiles % num_key_heads
    rows, query_counts, key_start, key_counts, first_query, first_key = tile_row(tiles, program % num_tiles)
    num_own = key_counts[0] * key_counts[1] * key_counts[2]
    num_other = query_counts[0] * query_counts[1] * query_counts[2]

    own = tl.arange(0, BLOCK_N)
    inside = own < num_own
    key_place = unravelled(tl.minimum(own, num_own - 1), key_counts)
    key_tokens = token_at(first_key, key_place, key_steps)
    key_place = moved(key_place, key_start)
    keys = load_rows(plane(key, key_strides, batch, key_head), key_tokens, key_strides[2], HEAD_DIM, BLOCK_D)
    value = plane(value, value_strides, batch, key_head)
    values = load_rows(value, key_tokens, value_strides[2], VALUE_DIM, BLOCK_V)

    key_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_sum = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for member in range(group_size):
        head = key_head * group_size + member
        head_query = plane(query, query_strides, batch, head)
        head_grad = plane(grad_output, grad_output_strides, batch, head)
        head_row = (batch * num_heads + head).to(tl.int64)
        head_table = table
        if table is not None:
            head_table = table + head * table_steps[2]
        head_logits = key_logits
        if key_logits is not None:
            head_logits = plane(key_logits, logits_strides, batch, head)
        logits_sum = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, num_other, BLOCK_M):
            other = start + tl.arange(0, BLOCK_M)
            query_place = unravelled(tl.minimum(other, num_other - 1), query_counts)
            query_tokens = token_at(first_query, query_place, query_steps)
            query_row = head_row * num_queries + query_tokens
            queries = load_rows(head_query, query_tokens, query_strides[2], HEAD_DIM, BLOCK_D)
            logits = logits_block(
                product(queries, tl.trans(keys), None, PRECISION), other < num_other, inside,
                spans_at(spans, rows, query_place), key_place, scale, head_table, table_steps, table_size, axial,
                query_row, axial_sizes, origins, head_logits, key_tokens, AXES, MASKED,
            )  # fmt: skip
            pivot = tl.load(lse + query_row) * LOG2E
            pivot = tl.where(pivot == float("-inf"), 0.0, pivot)  # a query that sees nothing: all its logits are -inf
            weights = tl.exp2(logits - pivot[:, None])
            grads = load_rows(head_grad, query_tokens, grad_output_strides[2], VALUE_DIM, BLOCK_V)
            value_sum = product(tl.trans(weights.to(grads.dtype)), grads, value_sum, PRECISION)
            grad_weights = product(grads, tl.trans(values), None, PRECISION)
            grad_logits = weights * (grad_weights - tl.load(delta + query_row)[:, None])
            key_sum = product(tl.trans(grad_logits.to(queries.dtype)), queries, key_sum, PRECISION)
            logits_sum += tl.sum(grad_logits, 0)
        if grad_key_logits is not None:
            tl.store(grad_key_logits + head_row * num_keys + key_tokens, logits_sum, mask=inside)
    grad_key = plane(grad_key, grad_key_strides, batch, key_head)
    store_rows(grad_key, key_tokens, grad_key_strides[2], key_sum * factor, inside, HEAD_DIM, BLOCK_D)
    grad_value = plane(grad_value, grad_value_strides, batch, key_head)
    store_rows(grad_value, key_tokens, grad_value_strides[2], value_sum, inside, VALUE_DIM, BLOCK_V)
