"""The three products between tokens, the 3x3 cells around them and one weight per pair, as in ``super_token_cells``.

A map has ``rows x columns`` cells of ``height x width`` tokens; tokens and cells are row-major. Tensors are contiguous,
sums are made in float32 and in a fixed order. Nothing here has run on a GPU yet: it is tested under Triton's
interpreter and compiled ahead of time.
"""

# What a kernel's text means to the type checker is not what Triton's compiler makes of it.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_in_cell(place, cell, columns, height, width):
    """Return the tokens at row-major places of a cell."""
    row = cell // columns * height + place // width
    return row * (columns * width) + cell % columns * width + place % width


@triton.jit
def products_kernel(
    tokens, centres, products, scale, rows, columns, height, width, channels,
    OPERAND: tl.constexpr, SOFTMAX: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store ``scale x_n . s_m(n,o)``, ``(B, N, 9)`` in float32, or its softmax over the 9 cells around a token.

    A program is ``TOKENS`` tokens of one cell. The 9 neighbours are padded to the 16 columns that a product needs.
    """
    blocks = tl.cdiv(height * width, TOKENS)
    program = tl.program_id(0)
    cell = program // blocks % (rows * columns)
    sample = (program // blocks // (rows * columns)).to(tl.int64)
    place = program % blocks * TOKENS + tl.arange(0, TOKENS)
    inside = place < height * width
    token = sample * (rows * columns * height * width) + token_in_cell(place, cell, columns, height, width)
    offset = tl.arange(0, 16)
    row, column = cell // columns + offset // 3 - 1, cell % columns + offset % 3 - 1
    exists = (offset < 9) & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    neighbour = sample * (rows * columns) + row * columns + column
    total = tl.zeros((TOKENS, 16), tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[None, :]
        kept = channel < channels
        mine = tl.load(tokens + token[:, None] * channels + channel, mask=inside[:, None] & kept, other=0.0)
        around = tl.load(centres + neighbour[:, None] * channels + channel, mask=exists[:, None] & kept, other=0.0)
        total = tl.dot(mine.to(OPERAND), tl.trans(around.to(OPERAND)), total, input_precision="ieee")
    total *= scale
    if SOFTMAX:
        total = tl.where((offset < 9)[None, :], total, float("-inf"))
        total = tl.exp(total - tl.max(total, 1)[:, None])
        total /= tl.sum(total, 1)[:, None]
    tl.store(products + token[:, None] * 9 + offset[None, :], total, mask=inside[:, None] & (offset < 9)[None, :])


@triton.jit
def spreads_kernel(
    centres, weights, output, rows, columns, height, width, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Store ``sum_o w_no s_m(n,o)``, ``(B, N, C)``. A program is ``TOKENS`` tokens of one cell by ``CHANNELS``."""
    blocks, channel_blocks = tl.cdiv(height * width, TOKENS), tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    channel = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    program = program // channel_blocks
    cell = program // blocks % (rows * columns)
    sample = (program // blocks // (rows * columns)).to(tl.int64)
    place = program % blocks * TOKENS + tl.arange(0, TOKENS)
    inside = place < height * width
    token = sample * (rows * columns * height * width) + token_in_cell(place, cell, columns, height, width)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for offset in range(9):
        row, column = cell // columns + offset // 3 - 1, cell % columns + offset % 3 - 1
        exists = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        neighbour = sample * (rows * columns) + row * columns + column
        around = tl.load(centres + neighbour * channels + channel, mask=exists & (channel < channels), other=0.0)
        weight = tl.load(weights + token * 9 + offset, mask=inside & exists, other=0.0)
        total += weight.to(tl.float32)[:, None] * around.to(tl.float32)[None, :]
    target = output + token[:, None] * channels + channel[None, :]
    tl.store(target, total.to(output.dtype.element_ty), mask=inside[:, None] & (channel < channels)[None, :])


@triton.jit
def sums_kernel(
    tokens, weights, output, rows, columns, height, width, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Store ``sum_no w_no x_n`` over the pairs with ``m(n,o) = m``, ``(B, M, C)``.

    A program is one cell by ``CHANNELS`` channels; it collects from the 9 cells around it, without atomic additions.
    """
    channel_blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    channel = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    cell = program // channel_blocks % (rows * columns)
    sample = (program // channel_blocks // (rows * columns)).to(tl.int64)
    total = tl.zeros((CHANNELS,), tl.float32)
    for offset in range(9):
        # What reaches this cell at an offset comes from the cell on the opposite side.
        row, column = cell // columns - offset // 3 + 1, cell % columns - offset % 3 + 1
        exists = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        for start in range(0, height * width, TOKENS):
            place = start + tl.arange(0, TOKENS)
            inside = (place < height * width) & exists
            token = token_in_cell(place, row * columns + column, columns, height, width)
            token = sample * (rows * columns * height * width) + token
            weight = tl.load(weights + token * 9 + offset, mask=inside, other=0.0).to(tl.float32)
            pointers = tokens + token[:, None] * channels + channel[None, :]
            given = tl.load(pointers, mask=inside[:, None] & (channel < channels)[None, :], other=0.0)
            total += tl.sum(weight[:, None] * given.to(tl.float32), 0)
    target = (sample * (rows * columns) + cell) * channels + channel
    tl.store(output + target, total.to(output.dtype.element_ty), mask=channel < channels)
