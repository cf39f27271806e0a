"""Biases by position: cosine of the offset, class token, decomposed relative position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from vislm.errors import UsageError
from vislm.kernels.bias import LowRankBias


def cosine_bias(
    frequencies: Tensor, num_queries: int, num_keys: int | None = None, *, amplitude: Tensor | float = 1.0
) -> LowRankBias:
    """Return ``sum_f amplitude_f cos(frequency_f (i - j))`` in factors of two channels per frequency.

    Queries are aligned to the end of the keys. The factors are ``amplitude [cos wi, sin wi] | [cos wj, sin wj]``.

    Args:
        frequencies: ``(F,)`` shared by the heads or ``(H, F)``, in radians per token; may require gradients.
        num_queries: ``Nq``.
        num_keys: ``Nk``, None = ``Nq``.
        amplitude: a number, or a tensor that broadcasts to the frequencies' shape or is ``(H, F)``.
    """
    num_keys = num_queries if num_keys is None else num_keys
    if not isinstance(frequencies, Tensor) or frequencies.ndim not in (1, 2) or not frequencies.is_floating_point():
        given = tuple(frequencies.shape) if isinstance(frequencies, Tensor) else repr(frequencies)
        raise UsageError(f"frequencies is {given}, expected a floating-point tensor (F,) or (H, F)")
    if num_queries < 1 or num_keys < 1:
        raise UsageError(f"{num_queries=}, {num_keys=}, expected at least one of each")
    key = torch.arange(num_keys, device=frequencies.device)
    query = torch.arange(num_queries, device=frequencies.device) + num_keys - num_queries
    size = torch.as_tensor(amplitude, dtype=frequencies.dtype, device=frequencies.device)
    size = size.expand(torch.broadcast_shapes(size.shape, frequencies.shape))
    size = size[(None,) * (2 - size.ndim)]
    query_waves = _waves(frequencies, query) * torch.cat([size, size], dim=-1)[:, None]
    return LowRankBias(query_waves[None], _waves(frequencies, key)[None])


def _waves(frequencies: Tensor, position: Tensor) -> Tensor:
    """Return cosines and sines (1 or H, N, 2 F)."""
    # float32 would be off by a thousandth of a radian after ten thousand tokens; Apple's GPUs have nothing wider
    wide = torch.float32 if frequencies.device.type == "mps" else torch.float64
    angle = frequencies.to(wide)[..., None, :] * position.to(wide)[:, None]
    waves = torch.cat([angle.cos(), angle.sin()], dim=-1).to(frequencies.dtype)
    return waves[(None,) * (3 - waves.ndim)]


def class_token_bias(
    num_tokens: int, *, class_to_patches: Tensor | float = 0.0, patches_to_class: Tensor | float = 0.0
) -> LowRankBias:
    """Return the bias between the class token (token 0) and the patches in two channels.

    The class token's query gets ``class_to_patches`` on every patch, every patch's query gets ``patches_to_class`` on
    the class token; all else is 0.

    Args:
        num_tokens: ``N``, class token included.
        class_to_patches: a number or ``(H,)``.
        patches_to_class: a number or ``(H,)``.
    """
    if num_tokens < 1:
        raise UsageError(f"{num_tokens=}, expected the class token at least")
    tensors = [given for given in (class_to_patches, patches_to_class) if isinstance(given, Tensor)]
    device = tensors[0].device if tensors else None
    to_patches, to_class = (
        torch.as_tensor(given, dtype=torch.float32 if not tensors else tensors[0].dtype, device=device)
        for given in (class_to_patches, patches_to_class)
    )
    for name, tensor in (("class_to_patches", to_patches), ("patches_to_class", to_class)):
        if tensor.ndim > 1:
            raise UsageError(f"{name} has shape {tuple(tensor.shape)}, expected a number or (H,)")
    to_patches, to_class = torch.broadcast_tensors(to_patches.reshape(-1, 1), to_class.reshape(-1, 1))
    is_class = torch.zeros(num_tokens, dtype=to_patches.dtype, device=device)
    is_class[0] = 1.0
    query = torch.stack([to_patches * is_class, to_class * (1 - is_class)], dim=-1)
    return LowRankBias(query[None], torch.stack([1 - is_class, is_class], dim=-1)[None, None])


def decomposed_position_bias(
    query: Tensor,
    tables: Sequence[Tensor],
    grid: Sequence[int],
    *,
    query_grid: Sequence[int] | None = None,
    prefix: int = 0,
) -> LowRankBias:
    """Return SAM's, ViTDet's and MViTv2's decomposed relative position, ``sum_a q_i . table_a[i_a - j_a]``, in factors.

    Query ``i`` carries its dot products with each row of keys, of each axis; key ``j`` says with ones in which rows it
    lies. The rank is the sum of the grid's sizes. The query enters **without** the attention's scale.

    Args:
        query: ``(B, H, Nq, D)``, tokens row-major after ``prefix`` others.
        tables: per axis ``(2 S - 1, D)`` or ``(H, 2 S - 1, D)``, row ``query coordinate - key coordinate + S - 1``;
            ``S`` is the larger of the two grids' sizes. See :func:`resize_position_table`.
        grid: the keys' grid.
        query_grid: the queries' grid if it differs (pooled attention); the coarser one's coordinates are stretched.
        prefix: tokens in front of both grids, which get bias 0.
    """
    queries = tuple(grid if query_grid is None else query_grid)
    _check_decomposed(query, tables, tuple(grid), queries, prefix)
    cells = query[:, :, prefix:].unflatten(2, queries)
    products, rows = [], []
    for axis, (table, size, query_size) in enumerate(zip(tables, grid, queries, strict=True)):
        chosen = table[..., _relative_rows(query_size, size, query.device), :]
        chosen = chosen[(None,) * (4 - chosen.ndim)]
        product = torch.einsum("bh...sd,hskd->bh...sk", cells.movedim(2 + axis, -2), chosen)
        products.append(product.movedim(-2, 2 + axis).flatten(2, -2))
        after, before = math.prod(grid[axis + 1 :]), math.prod(grid[:axis])
        one_hot = torch.eye(size, dtype=query.dtype, device=query.device)
        rows.append(one_hot.repeat_interleave(after, dim=0).repeat(before, 1))
    query_factor, key_factor = torch.cat(products, dim=-1), torch.cat(rows, dim=-1)[None, None]
    return LowRankBias(pad(query_factor, (0, 0, prefix, 0)), pad(key_factor, (0, 0, prefix, 0)))


def resize_position_table(table: Tensor, size: int) -> Tensor:
    """Return a relative position table ``(.., S, D)`` resized to ``2 size - 1`` rows by linear interpolation.

    For a checkpoint trained at another resolution; ``size`` is the larger of the query and key grids' sizes.
    """
    rows = 2 * size - 1
    if table.shape[-2] == rows:
        return table
    flat = table.reshape(-1, *table.shape[-2:]).transpose(-1, -2)
    resized = interpolate(flat, size=rows, mode="linear").transpose(-1, -2)
    return resized.reshape(*table.shape[:-2], rows, table.shape[-1])


def _relative_rows(query_size: int, key_size: int, device: torch.device) -> Tensor:
    """Return the table row of each pair (query_size, key_size); the coarser axis is stretched to the finer."""
    query_step, key_step = max(key_size / query_size, 1.0), max(query_size / key_size, 1.0)
    query = torch.arange(query_size, device=device)[:, None] * query_step
    key = torch.arange(key_size, device=device)[None] * key_step
    return (query - key + (key_size - 1) * key_step).long()


def _check_decomposed(
    query: Tensor, tables: Sequence[Tensor], grid: tuple[int, ...], queries: tuple[int, ...], prefix: int
) -> None:
    if len(tables) != len(grid) or len(queries) != len(grid) or min(*grid, *queries) < 1:
        raise UsageError(
            f"{len(tables)} tables for keys on a grid {grid} and queries on {queries}, expected one table per axis and "
            "positive sizes"
        )
    if query.ndim != 4 or query.shape[2] != prefix + math.prod(queries):
        raise UsageError(
            f"query has shape {tuple(query.shape)}, expected (B, H, Nq, D) with Nq = {prefix} + {math.prod(queries)} "
            f"for the grid {queries}"
        )
    for axis, table in enumerate(tables):
        size = max(grid[axis], queries[axis])
        heads = (1, query.shape[1]) if table.ndim == 3 else ()
        expected = (2 * size - 1, query.shape[-1])
        if table.ndim not in (2, 3) or tuple(table.shape[-2:]) != expected or (heads and len(table) not in heads):
            raise UsageError(
                f"tables[{axis}] has shape {tuple(table.shape)}, expected {expected} or one such table per head; "
                f"resize_position_table(table, {size}) adapts the rows"
            )
