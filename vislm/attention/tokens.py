"""Tokens ``(B, N, C)`` as heads and as maps; the checks that every attention makes of its input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from vislm.errors import UsageError


def check_heads(dim: int, num_heads: int) -> int:
    """Return the width of a head; raise ``UsageError`` unless ``num_heads`` divides ``dim``."""
    if num_heads < 1 or dim % num_heads:
        raise UsageError(f"{dim=} is not a multiple of {num_heads=}")
    return dim // num_heads


def check_tokens(x: Tensor, grid: Sequence[int], dim: int, num_prefix: int, axes: int) -> tuple[int, ...]:
    """Return the grid as a tuple; raise ``UsageError`` unless x is ``(B, num_prefix + prod(grid), dim)``."""
    sizes = tuple(grid)
    if len(sizes) != axes or min(sizes) < 1:
        raise UsageError(f"{grid=}, expected {axes} positive sizes; give window_size one number per axis of the grid")
    tokens = num_prefix + math.prod(sizes)
    if x.ndim != 3 or x.shape[1:] != (tokens, dim):
        raise UsageError(
            f"x has shape {tuple(x.shape)}, expected (B, N, C) = (B, {tokens}, {dim}) for {num_prefix} prefix tokens "
            f"and the grid {sizes}; pass the grid of these tokens and num_prefix_tokens=their class and register tokens"
        )
    return sizes


def per_axis(name: str, given: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return one value per axis; a single one is repeated."""
    values = tuple(given) if isinstance(given, Sequence) else (given,) * axes
    if len(values) != axes:
        raise UsageError(f"{name}={given}, expected one number, or one for each of {axes} axes")
    return values


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Return ``(B, N, H * D)`` as ``(B, H, N, D)``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Return ``(B, H, N, D)`` as ``(B, N, H * D)``."""
    return x.transpose(1, 2).flatten(2)


def to_map(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Return ``(B, N, C)`` as ``(B, C, *grid)``, a view: of two axes, a map in channels-last order."""
    # Unflattened first: in the other order a batch of one gets strides that no convolution takes for channels-last.
    return x.unflatten(1, tuple(grid)).movedim(-1, 1)


def to_tokens(x: Tensor) -> Tensor:
    """Return ``(B, C, *grid)`` as ``(B, N, C)``."""
    return x.flatten(2).transpose(1, 2)


def channels_last(x: Tensor) -> Tensor:
    """Return a map ``(B, C, H, W)`` stored as tokens are: :func:`to_tokens` of it, or convolved, copies nothing."""
    return x.contiguous(memory_format=torch.channels_last)


def pad_grid(x: Tensor, grid: Sequence[int], sizes: Sequence[int], num_prefix: int = 0) -> Tensor:
    """Return x, prefix tokens and those of ``grid``, with zero tokens behind each axis up to ``sizes``."""
    if tuple(grid) == tuple(sizes):
        return x
    room = [side for size, wanted in zip(grid, sizes, strict=True) for side in (wanted - size, 0)]
    return on_grid(x, num_prefix, lambda p: pad(p.unflatten(1, tuple(grid)), (0, 0, *reversed(room))).flatten(1, -2))


def crop_grid(x: Tensor, grid: Sequence[int], sizes: Sequence[int], num_prefix: int = 0) -> Tensor:
    """Return x, prefix tokens and those of ``grid``, with only the first ``sizes`` tokens along each axis."""
    if tuple(grid) == tuple(sizes):
        return x
    kept = (slice(None), *(slice(size) for size in sizes))
    return on_grid(x, num_prefix, lambda p: p.unflatten(1, tuple(grid))[kept].flatten(1, -2))


def on_grid(x: Tensor, num_prefix: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x with the tokens behind the prefix changed."""
    if num_prefix == 0:
        return change(x)
    return torch.cat((x[:, :num_prefix], change(x[:, num_prefix:])), dim=1)
