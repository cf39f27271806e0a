"""What all dense kernels share: the logits of one tile, and the weights that they become.

Logits are kept in base 2 (multiplied by log2 e), as the hardware's exponential is; so is the log-sum-exp that the
kernels pass on. With ``row`` and ``column`` shaped accordingly, a tile is (queries, keys) or its transpose.
"""

# Triton's language is not typed Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_logits(
    products,
    row,
    column,
    bias,
    bias_strides,
    key_logits,
    num_queries,
    num_keys,
    scale,
    unit,
    offset,
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """Return ``products * scale + (bias + key_logits) * unit [+ offset]``, ``-inf`` where a query does not see a key.

    ``row`` and ``column`` are the indices of queries and keys, shaped to broadcast to ``products``; ``bias`` and
    ``key_logits`` point at this head's plane. With ``BOUNDED`` keys beyond the last one are hidden.
    """
    logits = products * scale
    if key_logits is not None:
        logits += tl.load(key_logits + column, mask=column < num_keys, other=0.0) * unit
    if bias is not None:
        pointer = bias + row.to(tl.int64) * bias_strides[2] + column.to(tl.int64) * bias_strides[3]
        inside = (row < num_queries) & (column < num_keys)
        logits += tl.load(pointer, mask=inside, other=0.0).to(tl.float32) * unit
    if SIGMOID:
        logits += offset
    if BOUNDED:
        logits = tl.where(column < num_keys, logits, float("-inf"))
    if CAUSAL:
        logits = tl.where(column <= row + (num_keys - num_queries), logits, float("-inf"))
    return logits


@triton.jit
def tile_weights(logits, log_sum, SIGMOID: tl.constexpr):
    """Return the weights of a tile; ``log_sum`` is the rows' base-2 log-sum-exp, unused by the sigmoid."""
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp2(-logits))
    else:
        return tl.exp2(logits - log_sum)


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr):
    """Return ``left @ right``, added to ``total`` if that is not None, in float32.

    ``PRECISION`` is ``"tensor_cores"`` for 16-bit numbers, ``"ieee"`` for float32, and ``"widened"`` for bfloat16 under
    the interpreter, which takes the bits of bfloat16 for integers.
    """
    if PRECISION == "widened":
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    elif PRECISION == "ieee":
        return tl.dot(left, right, total, input_precision="ieee")
    else:
        return tl.dot(left, right, total)


@triton.jit
def load_tile(plane, stride, first, size, channel, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr):
    """Return the tile (ROWS, PADDED) of a plane ``(size, CHANNELS)`` from row ``first`` on; 0 outside of it."""
    local = tl.arange(0, ROWS)  # only the first row's offset can be large, and it is one number
    pointer = plane + tl.cast(first, tl.int64) * stride + (local[:, None] * stride + channel[None, :])
    inside = local[:, None] < size - first
    if CHANNELS != PADDED:
        inside = inside & (channel[None, :] < CHANNELS)
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def store_tile(
    plane, stride, first, size, channel, tile, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr
):
    """Write what :func:`load_tile` would read, in the plane's dtype."""
    local = tl.arange(0, ROWS)
    pointer = plane + tl.cast(first, tl.int64) * stride + (local[:, None] * stride + channel[None, :])
    inside = local[:, None] < size - first
    if CHANNELS != PADDED:
        inside = inside & (channel[None, :] < CHANNELS)
    tl.store(pointer, tile.to(plane.dtype.element_ty), mask=inside)


@triton.jit
def load_log_sum(plane, row, num_queries):
    """Return the log-sum-exp of rows; ``+inf``, so that weights are 0, where a row sees nothing or does not exist."""
    log_sum = tl.load(plane + row, mask=row < num_queries, other=float("inf"))
    return tl.where(log_sum == float("-inf"), float("inf"), log_sum)


@triton.jit
def visible_keys(tile, num_queries, num_keys, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """Return the end of the keys that the query tile sees: all of them, or those up to its last query."""
    if CAUSAL:
        return tl.maximum(0, tl.minimum(num_keys, (tile + 1) * ROWS + num_keys - num_queries))
    else:
        return num_keys


@triton.jit
def unmasked_keys(tile, num_queries, num_keys, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr):
    """Return the end of the whole key tiles that every query of the tile sees; up to there no mask is needed."""
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(num_keys, tile * ROWS + num_keys - num_queries + 1))
    else:
        end = num_keys
    return end // COLUMNS * COLUMNS


@triton.jit
def plane_of(tensor, strides, batch, head):
    """Return a pointer to the tokens of one sample and head."""
    return tensor + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]


@triton.jit
def broadcast_plane(tensor, strides, batch, head):
    """Return :func:`plane_of`, or None for a term that is not there."""
    if tensor is None:
        return tensor
    else:  # what stands behind an if is compiled in any case
        return plane_of(tensor, strides, batch, head)
