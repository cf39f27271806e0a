"""Kernels that move tokens: copy rows to where they are wanted, add rows up where they go.

Nothing here has run on a GPU yet: it is tested under Triton's interpreter and compiled ahead of time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    tokens, index, output, token_strides, num_tokens, num_rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Store ``output[b, k] = tokens[b, index[b, k]]``, zeros for an index outside the tokens.

    A program is ``ROWS`` rows of one sample by ``CHANNELS`` channels; ``index`` and ``output`` are contiguous.
    """
    row_blocks, channel_blocks = tl.cdiv(num_rows, ROWS), tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    sample = (program // channel_blocks // row_blocks).to(tl.int64)
    row = program // channel_blocks % row_blocks * ROWS + tl.arange(0, ROWS)
    channel = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    source = tl.load(index + sample * num_rows + row, mask=row < num_rows, other=-1).to(tl.int64)
    known = (source >= 0) & (source < num_tokens)
    kept = channel[None, :] < channels
    pointers = tokens + sample * token_strides[0] + source[:, None] * token_strides[1] + channel[None, :]
    rows = tl.load(pointers, mask=known[:, None] & kept, other=0.0)
    target = (sample * num_rows + row)[:, None] * channels + channel[None, :]
    tl.store(output + target, rows, mask=(row < num_rows)[:, None] & kept)


@triton.jit
def combine_kernel(
    tokens, weights, order, starts, output, token_strides, num_tokens, num_rows, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store ``output[b, m] = sum_n weights[b, n] tokens[b, n]`` over the tokens that go to ``m``.

    ``order`` ``(B, num_tokens)`` lists the tokens by where they go, ``starts`` ``(B, num_rows + 1)`` where each row's
    begin in it. A program is one row by ``CHANNELS`` channels and adds ``ROWS`` tokens at a time, always in this order.
    """
    channel_blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    sample = (program // channel_blocks // num_rows).to(tl.int64)
    row = program // channel_blocks % num_rows
    channel = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.load(starts + sample * (num_rows + 1) + row)
    last = tl.load(starts + sample * (num_rows + 1) + row + 1)
    total = tl.zeros((CHANNELS,), tl.float32)
    for place in range(first, last, ROWS):
        entry = place + tl.arange(0, ROWS)
        inside = entry < last
        source = tl.load(order + sample * num_tokens + entry, mask=inside, other=0).to(tl.int64)
        pointers = tokens + sample * token_strides[0] + source[:, None] * token_strides[1] + channel[None, :]
        rows = tl.load(pointers, mask=inside[:, None] & (channel[None, :] < channels), other=0.0).to(tl.float32)
        if weights is not None:
            weight = tl.load(weights + sample * num_tokens + source, mask=inside, other=0.0)
            rows = rows * weight.to(tl.float32)[:, None]
        total += tl.sum(rows, 0)
    target = (sample * num_rows + row) * channels + channel
    tl.store(output + target, total.to(output.dtype.element_ty), mask=channel < channels)


@triton.jit
def combine_backward_kernel(
    tokens, weights, index, grad, grad_tokens, grad_weights, token_strides, grad_strides,
    num_tokens, num_rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store the gradients of :func:`combine_kernel`: ``weights[b, n] grad[b, index[b, n]]`` for tokens, and for weights
    the product of ``grad[b, index[b, n]]`` with the token.

    A program is ``ROWS`` tokens of one sample; it goes over their channels.
    """
    token_blocks = tl.cdiv(num_tokens, ROWS)
    program = tl.program_id(0)
    sample = (program // token_blocks).to(tl.int64)
    token = program % token_blocks * ROWS + tl.arange(0, ROWS)
    inside = token < num_tokens
    row = tl.load(index + sample * num_tokens + token, mask=inside, other=-1).to(tl.int64)
    known = (row >= 0) & (row < num_rows)
    weight = tl.load(weights + sample * num_tokens + token, mask=inside, other=0.0).to(tl.float32)
    product = tl.zeros((ROWS,), tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        kept = channel[None, :] < channels
        arriving = grad + sample * grad_strides[0] + row[:, None] * grad_strides[1] + channel[None, :]
        arrived = tl.load(arriving, mask=known[:, None] & kept, other=0.0).to(tl.float32)
        pointers = (
            tokens + sample * token_strides[0] + token.to(tl.int64)[:, None] * token_strides[1] + channel[None, :]
        )
        rows = tl.load(pointers, mask=inside[:, None] & kept, other=0.0).to(tl.float32)
        product += tl.sum(rows * arrived, 1)
        target = (sample * num_tokens + token)[:, None] * channels + channel[None, :]
        given = (arrived * weight[:, None]).to(grad_tokens.dtype.element_ty)
        tl.store(grad_tokens + target, given, mask=inside[:, None] & kept)
    tl.store(grad_weights + sample * num_tokens + token, product, mask=inside)
