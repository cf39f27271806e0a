"""The backward kernel of fused neighborhood attention for queries and biases: one program per tile of queries and head.

Nothing here has run on a GPU yet: it is tested under Triton's interpreter and compiled ahead of time.
"""

# What a kernel's text means to the type checker is not what Triton's compiler makes of it.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from vislm.kernels.backends.triton.dense.tile import product
from vislm.kernels.backends.triton.neighborhood.device import (
    LOG2E,
    axial_index,
    load_rows,
    logits_block,
    moved,
    plane,
    spans_at,
    store_rows,
    table_index,
    tile_row,
    token_at,
    unravelled,
)


@triton.jit
def neighborhood_backward_query(
    query, key, value, table, axial, key_logits, tiles, spans, output, lse, grad_output, grad_lse,
    delta, grad_query, grad_table, grad_axial,
    query_strides, key_strides, value_strides, logits_strides, output_strides, grad_output_strides, grad_query_strides,
    table_steps, table_size, axial_sizes, origins, query_steps, key_steps, num_copies, copy_size,
    num_tiles, num_heads, group_size, num_queries, scale, factor,
    AXES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store ``delta`` and the gradient of a tile of queries, and add up those of their biases.

    ``delta_i = sum_c dO_ic O_ic - dLSE_i``, so that ``dS_ij = P_ij (dO_i . v_j - delta_i)``. Arguments as in
    :func:`neighborhood_forward`; ``grad_lse``, ``grad_table`` and ``grad_axial`` may be None. ``grad_table`` holds
    ``num_copies`` float32 copies of the table with ``copy_size`` entries each, over which the programs spread their
    atomic additions; rows of ``grad_axial`` belong to one program each. ``factor`` is the attention's scale.
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
    grad_output = plane(grad_output, grad_output_strides, batch, head)
    grads = load_rows(grad_output, query_tokens, grad_output_strides[2], VALUE_DIM, BLOCK_V)
    output = plane(output, output_strides, batch, head)
    outputs = load_rows(output, query_tokens, output_strides[2], VALUE_DIM, BLOCK_V)
    deltas = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    if grad_lse is not None:
        deltas -= tl.load(grad_lse + query_row)
    tl.store(delta + query_row, deltas, mask=inside)
    pivot = tl.load(lse + query_row) * LOG2E
    pivot = tl.where(pivot == float("-inf"), 0.0, pivot)  # a query that sees nothing: all its logits are -inf
    key = plane(key, key_strides, batch, head // group_size)
    value = plane(value, value_strides, batch, head // group_size)
    if table is not None:
        table += head * table_steps[2]
    if grad_table is not None:
        grad_table += (program % num_copies).to(tl.int64) * copy_size + head * table_steps[2]
    if key_logits is not None:
        key_logits = plane(key_logits, logits_strides, batch, head)

    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, num_other, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        key_place = unravelled(tl.minimum(other, num_other - 1), key_counts)
        key_tokens = token_at(first_key, key_place, key_steps)
        key_place = moved(key_place, key_start)
        keys = load_rows(key, key_tokens, key_strides[2], HEAD_DIM, BLOCK_D)
        logits = logits_block(
            product(queries, tl.trans(keys), None, PRECISION), inside, other < num_other, query_spans,
            key_place, scale, table, table_steps, table_size, axial, query_row, axial_sizes, origins,
            key_logits, key_tokens, AXES, MASKED,
        )  # fmt: skip
        values = load_rows(value, key_tokens, value_strides[2], VALUE_DIM, BLOCK_V)
        grad_weights = product(grads, tl.trans(values), None, PRECISION)
        grad_logits = tl.exp2(logits - pivot[:, None]) * (grad_weights - deltas[:, None])
        result = product(grad_logits.to(keys.dtype), keys, result, PRECISION)
        if grad_table is not None:
            index = table_index(query_spans[2], key_place, table_steps, origins, table_size)
            tl.atomic_add(grad_table + index, grad_logits, mask=grad_logits != 0.0, sem="relaxed")
        if grad_axial is not None:
            for axis in tl.static_range(3 - AXES, 3):
                index = axial_index(query_row, query_spans[2][axis], key_place[axis], axial_sizes[axis], origins[axis])
                tl.atomic_add(grad_axial[axis] + index, grad_logits, mask=grad_logits != 0.0, sem="relaxed")
    grad_query = plane(grad_query, grad_query_strides, batch, head)
    store_rows(grad_query, query_tokens, grad_query_strides[2], result * factor, inside, HEAD_DIM, BLOCK_D)
