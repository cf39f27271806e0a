"""What every attention must do, as one check for tests: any grid, prefix tokens, batches, gradients, half precision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GRIDS = ((8, 8), (7, 10), (12, 5))
"""Square, odd, wide."""
PREFIXES = (0, 1, 3)


def check_attention(kind: type[nn.Module], *, dim: int = 32, num_heads: int = 4, **options: Any) -> None:
    """Check a class of attention: that ``forward(x, grid)`` keeps the promises of :mod:`vislm.attention`.

    - Grids of any shape, and (if it takes ``num_prefix_tokens``) any number of class and register tokens.
    - A batch gives what its samples give alone; evaluation gives the same twice.
    - Gradients reach the tokens and every parameter, and are finite.
    - bfloat16 gives about the same as float32, in bfloat16.
    - ``macs(grid)`` is a positive whole number that grows with the grid.

    Args:
        kind: the class, built with ``dim``, ``num_heads`` and ``options``.
        dim: width C to build it with.
        num_heads: H.
        options: further arguments; they must fit a grid of 7 x 5.

    Raises:
        AssertionError: a promise that it does not keep.
    """
    takes_prefix = "num_prefix_tokens" in inspect.signature(kind).parameters
    for prefix in PREFIXES if takes_prefix else (0,):
        torch.manual_seed(prefix)
        given = {**options, "num_prefix_tokens": prefix} if takes_prefix else options
        attention = kind(dim=dim, num_heads=num_heads, **given).eval()
        for grid in GRIDS:
            x = torch.randn(3, prefix + grid[0] * grid[1], dim)
            where = f"{kind.__name__} on a grid of {grid} with {prefix} prefix tokens"
            _check_outputs(attention, x, grid, where)
            _check_gradients(attention, x, grid, where)
            _check_half_precision(kind(dim=dim, num_heads=num_heads, **given), x, grid, where)
        costs = [_macs(attention)((side, side)) for side in (8, 16)]
        _assert(
            isinstance(costs[0], int) and 0 < costs[0] < costs[1], f"{kind.__name__}: macs of 8 x 8, 16 x 16: {costs}"
        )


def _check_outputs(attention: nn.Module, x: Tensor, grid: Sequence[int], where: str) -> None:
    with torch.no_grad():
        output = attention(x, grid)
        _assert(output.shape == x.shape, f"{where} returns {tuple(output.shape)}, expected {tuple(x.shape)}")
        alone = torch.cat([attention(sample[None], grid) for sample in x])
        _close(alone, output, 1e-4, f"{where}: samples alone")
        _close(attention(x, grid), output, 1e-6, f"{where}: the second call")


def _check_gradients(attention: nn.Module, x: Tensor, grid: Sequence[int], where: str) -> None:
    attention.zero_grad()
    x = x.clone().requires_grad_()
    attention(x, grid).square().sum().backward()
    for name, leaf in (("x", x), *attention.named_parameters()):
        _assert(leaf.grad is not None, f"{where}: no gradient reaches {name}")
        _assert(bool(leaf.grad.isfinite().all()), f"{where}: the gradient of {name} is not finite")  # pyright: ignore[reportOptionalMemberAccess]


def _check_half_precision(attention: nn.Module, x: Tensor, grid: Sequence[int], where: str) -> None:
    with torch.no_grad():
        expected = attention.eval()(x, grid)
        ours = attention.bfloat16()(x.bfloat16(), grid)
    _assert(ours.dtype == torch.bfloat16, f"{where} returns {ours.dtype} for bfloat16")
    _close(ours.float(), expected, 0.1, f"{where}: bfloat16")


def _close(ours: Tensor, expected: Tensor, share: float, what: str) -> None:
    error = float((ours - expected).norm() / expected.norm().clamp_min(1e-6))
    _assert(error <= share, f"{what} differ by {error:.1e} of the norm, expected at most {share}")


def _macs(attention: nn.Module) -> Callable[[Sequence[int]], int]:
    return attention.macs  # pyright: ignore[reportReturnType] - attentions have it, modules do not


def _assert(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
