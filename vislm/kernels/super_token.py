"""Super tokens: soft superpixels, each pixel token associated with the 3x3 cells around its own.

The association is a sparse ``(B, N, 9)`` instead of a dense ``(B, N, M)`` matrix. PyTorch code on every device; CUDA
tensors go through Triton kernels where those are available.

Source: "Vision Transformer with Super Token Sampling" (arXiv 2211.11167); https://github.com/hhb072/STViT.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.kernels.super_token_cells import CellGrid, products, spreads, sums
from vislm.kernels.tokens import runs_triton

TINY = 1e-12


class SuperTokens(NamedTuple):
    """What :func:`sample_super_tokens` returns.

    Attributes:
        tokens: ``(B, M, C)`` super tokens, cells row-major.
        association: ``(B, N, 9)`` in float32: each token's weight for the cells around its own, row-major from the one
            above and left of it; cells outside the map have weights too, which are lost.
    """

    tokens: Tensor
    association: Tensor


def sample_super_tokens(
    tokens: Tensor, grid: tuple[int, int], cell: tuple[int, int], *, iterations: int = 1
) -> SuperTokens:
    """Return super tokens and association after a soft k-means that starts from the cells' means.

    Gradients flow through the tokens that the last update averages, not through the association, as in the paper's
    code.

    Args:
        tokens: ``(B, N, C)``, row-major on the grid.
        grid: ``(H, W)`` with ``H W = N``, multiples of the cell; pad the map with zeros where they are not.
        cell: height and width of a cell.
        iterations: updates of association and super tokens, 1 or more.

    Raises:
        UsageError: sizes that do not fit together.
    """
    cells = _cells(tokens, grid, cell)
    if iterations < 1:
        raise UsageError(f"{iterations=}, expected 1 or more: without an update there is no association")
    with torch.no_grad():
        centres = cells.grouped(tokens).mean(2)
        association = associate(tokens, centres, grid, cell)
        for _ in range(iterations - 1):
            association = associate(tokens, aggregate(tokens, association, grid, cell), grid, cell)
    return SuperTokens(aggregate(tokens, association, grid, cell), association)


def associate(
    tokens: Tensor, centres: Tensor, grid: tuple[int, int], cell: tuple[int, int], *, scale: float | None = None
) -> Tensor:
    """Return the association ``(B, N, 9)``: the softmax of each token's products with the 9 cells around its own.

    A cell outside the map has logit 0 and takes its share, as in the paper's code.

    Args:
        tokens: ``(B, N, C)``, row-major on the grid.
        centres: super tokens ``(B, M, C)``, cells row-major.
        grid: ``(H, W)`` with ``H W = N``, multiples of the cell.
        cell: height and width of a cell.
        scale: factor of the products, None = ``C ** -0.5``.

    Returns:
        float32, or float64 for float64 tokens.

    Raises:
        UsageError: sizes that do not fit together.
    """
    cells = _cells(tokens, grid, cell)
    _check_cells("centres", centres, tokens, cells)
    if centres.shape[2] != tokens.shape[2]:
        raise UsageError(f"centres have {centres.shape[2]} channels, the tokens {tokens.shape[2]}; they must agree")
    factor = tokens.shape[-1] ** -0.5 if scale is None else scale
    if runs_triton(tokens):
        from vislm.kernels.backends.triton.super_token import fused_association

        return fused_association(tokens, centres, cells, factor)
    return torch.softmax(products(tokens, centres, cells) * factor, -1)


def aggregate(tokens: Tensor, association: Tensor, grid: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """Return the super tokens ``(B, M, C)``: the mean of the tokens, weighted by their association with the cell.

    Args:
        tokens: ``(B, N, C)``, row-major on the grid.
        association: ``(B, N, 9)``.
        grid: ``(H, W)`` with ``H W = N``, multiples of the cell.
        cell: height and width of a cell.

    Raises:
        UsageError: sizes that do not fit together.
    """
    cells = _cells(tokens, grid, cell)
    _check_association(association, tokens.shape[:2])
    ones = association.new_ones(*association.shape[:2], 1)
    if runs_triton(tokens):
        from vislm.kernels.backends.triton.super_token import fused_sums

        total, mass = fused_sums(tokens, association, cells), fused_sums(ones, association, cells)
    else:
        total, mass = sums(tokens, association, cells), sums(ones, association, cells)
    return (total / (mass + TINY)).to(tokens.dtype)


def spread(super_tokens: Tensor, association: Tensor, grid: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """Return the tokens ``(B, N, C)``: each the sum of the super tokens around it, weighted by its association.

    Args:
        super_tokens: ``(B, M, C)``, cells row-major.
        association: ``(B, N, 9)``; not normalised again where cells lie outside the map.
        grid: ``(H, W)`` with ``H W = N``, multiples of the cell.
        cell: height and width of a cell.

    Raises:
        UsageError: sizes that do not fit together.
    """
    cells = _cells(association, grid, cell)
    _check_association(association, association.shape[:2])
    _check_cells("super_tokens", super_tokens, association, cells)
    if runs_triton(super_tokens):
        from vislm.kernels.backends.triton.super_token import fused_spreads

        return fused_spreads(super_tokens, association, cells)
    return spreads(super_tokens, association, cells).to(super_tokens.dtype)


def _cells(tokens: Tensor, grid: tuple[int, int], cell: tuple[int, int]) -> CellGrid:
    if len(grid) != 2 or len(cell) != 2 or min(*grid, *cell) < 1 or grid[0] % cell[0] or grid[1] % cell[1]:
        raise UsageError(
            f"{grid=} is not a multiple of {cell=}; expected (H, W) and (h, w) with H % h == W % w == 0: pad the map "
            "with zeros to the next multiple"
        )
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1] or not tokens.is_floating_point():
        raise UsageError(
            f"tokens are {tokens.dtype} {tuple(tokens.shape)}, expected floating-point (B, N = {grid[0] * grid[1]}, C) "
            f"for the {grid=}"
        )
    return CellGrid(grid[0] // cell[0], grid[1] // cell[1], cell[0], cell[1])


def _check_cells(name: str, given: Tensor, tokens: Tensor, cells: CellGrid) -> None:
    expected = (tokens.shape[0], cells.rows * cells.columns)
    if given.ndim != 3 or given.shape[:2] != expected or given.device != tokens.device:
        raise UsageError(
            f"{name} has shape {tuple(given.shape)} on {given.device}, expected (B, M, C) with (B, M) = {expected} on "
            f"{tokens.device}"
        )


def _check_association(association: Tensor, tokens: tuple[int, ...]) -> None:
    if association.shape != (*tokens, 9):
        raise UsageError(f"association has shape {tuple(association.shape)}, expected (B, N, 9) = {(*tokens, 9)}")
