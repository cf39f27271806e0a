"""Device functions that the neighborhood kernels share: tiles, windows, rows and logits.

Triples are tuples with one entry per axis of a grid of three axes; a grid of fewer has axes of size 1 in front.
"""

# What a kernel's text means to the type checker is not what Triton's compiler makes of it.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_row(tiles, index):
    """Return rows in the span table, query counts, first keys, key counts, first query and first key of a tile."""
    row = tiles + index * 16
    return (
        (tl.load(row), tl.load(row + 1), tl.load(row + 2)),
        (tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)),
        (tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)),
        (tl.load(row + 9), tl.load(row + 10), tl.load(row + 11)),
        tl.load(row + 12),
        tl.load(row + 13),
    )


@triton.jit
def unravelled(linear, counts):
    """Return the coordinates of row-major indices in a box."""
    rest = linear // counts[2]
    return rest // counts[1], rest % counts[1], linear % counts[2]


@triton.jit
def token_at(start, place, steps):
    """Return the tokens at places of a box whose first token is ``start``."""
    return start + place[0] * steps[0] + place[1] * steps[1] + place[2] * steps[2]


@triton.jit
def moved(place, start):
    """Return the places counted from the grid's first key instead of the box's."""
    return place[0] + start[0], place[1] + start[1], place[2] + start[2]


@triton.jit
def spans_at(spans, rows, place):
    """Return the first keys, the last keys and the anchors of the queries at places of a box."""
    row0, row1, row2 = (
        spans + (rows[0] + place[0]) * 4,
        spans + (rows[1] + place[1]) * 4,
        spans + (rows[2] + place[2]) * 4,
    )
    return (
        (tl.load(row0), tl.load(row1), tl.load(row2)),
        (tl.load(row0 + 1), tl.load(row1 + 1), tl.load(row2 + 1)),
        (tl.load(row0 + 2), tl.load(row1 + 2), tl.load(row2 + 2)),
    )


@triton.jit
def between(first, key, last):
    """Return ``(M, N)``: each key lies within each query's range."""
    return (first[:, None] <= key[None, :]) & (key[None, :] <= last[:, None])


@triton.jit
def load_rows(base, token, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the rows ``(tokens, BLOCK)`` of a tensor, zero behind its ``WIDTH`` channels."""
    channel = tl.arange(0, BLOCK)
    pointers = base + token.to(tl.int64)[:, None] * stride + channel[None, :]
    if WIDTH == BLOCK:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=channel[None, :] < WIDTH, other=0.0)


@triton.jit
def store_rows(base, token, stride, rows, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store the rows of the tokens that are ``inside``."""
    channel = tl.arange(0, BLOCK)
    pointers = base + token.to(tl.int64)[:, None] * stride + channel[None, :]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=inside[:, None] & (channel[None, :] < WIDTH))


@triton.jit
def plane(tensor, strides, batch, head):
    """Return a pointer to the tokens of one sample and head."""
    return tensor + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def table_index(anchor, key, steps, origins, size):
    """Return ``(M, N)``: the entry of a head's table of ``size`` relative positions; any one for pairs without."""
    query = (origins[0] - anchor[0]) * steps[0] + (origins[1] - anchor[1]) * steps[1] + origins[2] - anchor[2]
    index = query[:, None] + (key[0] * steps[0] + key[1] * steps[1] + key[2])[None, :]
    # No mask of visible pairs: it would have to be built a second time, in the layout of the addresses.
    return tl.minimum(tl.maximum(index, 0), size - 1)


@triton.jit
def axial_index(row, anchor, key, size, origin):
    """Return ``(M, N)``: the entry of one axis' logits ``(B * Hq * Nq, size)``, likewise."""
    index = (origin - anchor)[:, None] + key[None, :]
    return (row.to(tl.int64) * size)[:, None] + tl.minimum(tl.maximum(index, 0), size - 1)


@triton.jit
def logits_block(
    products, query_inside, key_inside, spans, place, scale, table, table_steps, table_size, axial, axial_row, sizes,
    origins, key_logits, key, AXES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the logits ``(M, N)`` in base 2, ``-inf`` where a query does not see a key.

    Args:
        products: of queries and keys, ``(M, N)``; ``query_inside`` and ``key_inside`` tell which of them exist.
        spans: first keys, last keys and anchors of the queries.
        place: the keys' places, in the units of the spans.
        scale: factor of the products, times ``log2(e)``.
        table: None, or the head's relative logits ``table_size`` of them, with ``table_steps`` from entry to entry
            and ``origins`` of the axes.
        axial: None, or per axis logits per query and relative position, with ``sizes`` entries and ``origins``;
            ``axial_row`` is the queries' row in them.
        key_logits: None, or the head's logits per key; ``key`` are the keys' tokens.
    """
    allowed = query_inside[:, None] & key_inside[None, :]
    if MASKED:
        for axis in tl.static_range(3 - AXES, 3):
            allowed = allowed & between(spans[0][axis], place[axis], spans[1][axis])
    logits = products * scale
    if table is not None:
        index = table_index(spans[2], place, table_steps, origins, table_size)
        logits += tl.load(table + index).to(tl.float32) * LOG2E
    if axial is not None:
        for axis in tl.static_range(3 - AXES, 3):
            index = axial_index(axial_row, spans[2][axis], place[axis], sizes[axis], origins[axis])
            logits += tl.load(axial[axis] + index).to(tl.float32) * LOG2E
    if key_logits is not None:
        logits += (tl.load(key_logits + key).to(tl.float32) * LOG2E)[None, :]
    return tl.where(allowed, logits, float("-inf"))
