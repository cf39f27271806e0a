"""Checks of a bias against the call that it is given to."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.kernels.bias import Bias, DecoupledBias, GridBias, HeadwiseBias, LowRankBias, RelativeBias
from vislm.kernels.bias_rows import grid_sizes
from vislm.kernels.patterns import Pattern
from vislm.kernels.patterns.grid import GridPattern
from vislm.kernels.patterns.neighborhood import Neighborhood
from vislm.kernels.shapes import Shape, broadcasts_to, check_broadcast, check_floating, four_axes


def checked_bias(bias: Bias | None, pattern: Pattern, shape: Shape, head_dim: int) -> Bias | None:
    """Return the bias, dense ones with four axes; raise ``UsageError`` where it does not fit the call."""
    if bias is None:
        return None
    if isinstance(bias, GridBias):
        _check_grid_bias(bias, pattern, shape, head_dim)
        return bias
    if isinstance(bias, LowRankBias):
        _check_factors(bias, shape, shape.num_heads)
        return bias
    if isinstance(bias, HeadwiseBias):
        return _checked_headwise(bias, shape)
    check_floating("bias", bias, shape.device)
    check_broadcast("bias", bias, shape)
    return four_axes(bias)


def _check_grid_bias(bias: GridBias, pattern: Pattern, shape: Shape, head_dim: int) -> None:
    name = type(bias).__name__
    if not isinstance(pattern, GridPattern):
        raise UsageError(
            f"{name} needs a pattern on a grid, but the pattern is {type(pattern).__name__}; for full attention on a "
            "grid use Window(grid, window=grid)"
        )
    if isinstance(pattern, Neighborhood) and any(pattern.causal):
        raise UsageError(f"{name} is not defined with causal axes, but the pattern has causal={pattern.causal}")
    axes = len(pattern.grid)
    if isinstance(bias, RelativeBias):
        check_floating("RelativeBias.table", bias.table, shape.device)
        if bias.table.ndim != axes + 1 or bias.table.shape[0] not in (1, shape.num_heads):
            raise UsageError(
                f"RelativeBias.table has shape {tuple(bias.table.shape)}, expected (1 or Hq = {shape.num_heads}, one "
                f"size per axis of the grid {pattern.grid})"
            )
        sizes = tuple(bias.table.shape[1:])
    elif isinstance(bias, DecoupledBias):
        expected = f"{axes} tables (S, D = {head_dim}) or (Hq = {shape.num_heads}, S, D)"
        sizes = _sizes(name, "tables", bias.tables, axes, expected, shape)
        for table in bias.tables:
            if table.shape[-1] != head_dim or table.ndim not in (2, 3) or table.shape[:-2] not in ((), shape[1:2]):
                raise UsageError(f"DecoupledBias has a table of shape {tuple(table.shape)}, expected {expected}")
    else:
        full = (shape.batch, shape.num_heads, grid_sizes(pattern)[0])
        expected = f"{axes} tensors (B, Hq, Nq of the grid, S) = {(*full, 'S')}"
        sizes = _sizes(name, "logits", bias.logits, axes, expected, shape, last=-1)
        for logits in bias.logits:
            if logits.shape[:-1] != full:
                raise UsageError(f"AxialBias has logits of shape {tuple(logits.shape)}, expected {expected}")
    _check_offsets(name, bias.origins, sizes, pattern)


def _sizes(
    name: str, field: str, given: tuple[Tensor, ...], axes: int, expected: str, shape: Shape, last: int = -2
) -> tuple[int, ...]:
    if len(given) != axes:
        raise UsageError(f"{name} has {len(given)} {field} for a grid of {axes} axes, expected {expected}")
    for axis, tensor in enumerate(given):
        check_floating(f"{name}.{field}[{axis}]", tensor, shape.device)
        if tensor.ndim < 2:
            raise UsageError(f"{name}.{field}[{axis}] has shape {tuple(tensor.shape)}, expected {expected}")
    return tuple(tensor.shape[last] for tensor in given)


def _check_offsets(name: str, origins: tuple[int, ...], sizes: tuple[int, ...], pattern: GridPattern) -> None:
    if len(origins) != len(sizes):
        raise UsageError(f"{name}.origin={origins}, expected one index per axis of the grid {pattern.grid}")
    for axis, (origin, size) in enumerate(zip(origins, sizes, strict=True)):
        low, high = _offset_range(pattern, axis)
        if low + origin < 0 or high + origin >= size:
            raise UsageError(
                f"{name} has {size} entries along axis {axis} with relative position 0 at index {origin}, but the "
                f"pattern {pattern} has relative positions from {low} to {high}; expected {high - low + 1} entries "
                "or more"
            )


@lru_cache(maxsize=1024)
def _offset_range(pattern: GridPattern, axis: int) -> tuple[int, int]:
    """Return the smallest and largest relative position of a key that any query sees along an axis."""
    position = torch.arange(pattern.query_grid[axis])
    first, last = pattern.span(axis, position)
    anchor, step = pattern.anchor(axis, position), pattern.step(axis)
    return int(((first - anchor) // step).min()), int(((last - anchor) // step).max())


def _check_factors(bias: LowRankBias, shape: Shape, num_heads: int) -> None:
    ranks = set()
    for name, factor, tokens in (
        ("query_factor", bias.query_factor, shape.num_queries),
        ("key_factor", bias.key_factor, shape.num_keys),
    ):
        check_floating(f"LowRankBias.{name}", factor, shape.device)
        fits = factor.ndim == 4 and factor.shape[2] == tokens
        if not fits or not broadcasts_to(factor.shape[:2], (shape.batch, num_heads)):
            raise UsageError(
                f"LowRankBias.{name} has shape {tuple(factor.shape)}, expected (1 or B = {shape.batch}, 1 or heads = "
                f"{num_heads}, {tokens}, R)"
            )
        ranks.add(factor.shape[3])
    if len(ranks) > 1:
        raise UsageError(f"the factors of a LowRankBias have ranks {sorted(ranks)}; they must agree")


def _checked_headwise(bias: HeadwiseBias, shape: Shape) -> HeadwiseBias:
    named = sorted((*bias.low_rank_heads, *bias.dense_heads))
    if named != list(range(shape.num_heads)):
        raise UsageError(
            f"HeadwiseBias names the heads {named}, expected each of 0 to {shape.num_heads - 1} exactly once"
        )
    if not bias.low_rank_heads or not bias.dense_heads:
        raise UsageError("HeadwiseBias needs heads of both kinds; pass a LowRankBias or a dense tensor alone instead")
    _check_factors(bias.low_rank, shape, len(bias.low_rank_heads))
    check_floating("HeadwiseBias.dense", bias.dense, shape.device)
    check_broadcast("HeadwiseBias.dense", bias.dense, shape._replace(num_heads=len(bias.dense_heads)))
    return bias
