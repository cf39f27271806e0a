"""Picking, putting back and merging of tokens: the data movement of every pruning and merging method.

PyTorch code on every device; CUDA tensors go through Triton kernels where those are available. All three functions are
differentiable, in the tokens and in the sizes; gathering and adding up are each other's adjoints.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vislm.errors import UnknownName, UsageError

REDUCTIONS = ("mean", "sum")
LEAST_CAPABILITY = (8, 0)


class Merged(NamedTuple):
    """What :func:`merge_tokens` returns: ``tokens`` ``(B, M, C)`` and their ``sizes`` ``(B, M)``."""

    tokens: Tensor
    sizes: Tensor


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Return the tokens ``(B, K, C)`` at ``index``; pruning, and the way back from merged tokens to their sources.

    Args:
        tokens: ``(B, N, C)``, any floating dtype.
        index: integers ``(B, K)`` in ``[0, N)``, in any order, repeated ones included. Checked on the CPU only: on an
            accelerator that would stall it, so there a wrong index fails as in ``torch.gather`` or gives zeros.

    Raises:
        UsageError: shapes, dtypes, devices or indices that do not fit.
    """
    _check(tokens, index, tokens.shape[1] if tokens.ndim == 3 else 0)
    if runs_triton(tokens):
        from vislm.kernels.backends.triton.tokens import fused_gather

        return fused_gather(tokens, index)
    return _rows_at(tokens, index)


def scatter_tokens(tokens: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Return ``(B, num_tokens, C)`` with each token added at its ``index`` and zeros elsewhere.

    Undoes :func:`gather_tokens` for distinct indices, for example to draw the kept tokens on the patch grid.

    Args:
        tokens: ``(B, K, C)``.
        index: integers ``(B, K)`` in ``[0, num_tokens)``; see :func:`gather_tokens`.
        num_tokens: length of the result.

    Raises:
        UsageError: arguments that do not fit.
    """
    _check(tokens, index, num_tokens, each=True)
    return _combined(tokens, None, index, num_tokens)


def merge_tokens(
    tokens: Tensor,
    index: Tensor,
    num_tokens: int,
    sizes: Tensor | None = None,
    *,
    reduce: Literal["mean", "sum"] = "mean",
) -> Merged:
    """Return the merged tokens and how many original tokens each stands for.

    ``size'_m = sum_n size_n`` over the tokens with ``index_n = m``, and ``x'_m = sum_n size_n x_n / size'_m`` (without
    the division for ``reduce="sum"``). A destination without tokens gets zeros and size 0. ``log(size')`` as key logits
    is ToMe's proportional attention.

    Args:
        tokens: ``(B, N, C)``; half precision is added up in float32.
        index: integers ``(B, N)`` in ``[0, num_tokens)``: where each token goes; see :func:`gather_tokens`.
        num_tokens: number of merged tokens, M.
        sizes: ``(B, N)``, how many original tokens each token stands for, floating; None = one each.
        reduce: size-weighted mean or sum.

    Returns:
        ``(tokens (B, M, C), sizes (B, M))``; the sizes have the dtype of ``sizes``, float32 for None.

    Raises:
        UsageError: arguments that do not fit.

    Source: ToMe (arXiv 2210.09461); https://github.com/facebookresearch/ToMe.
    """
    _check(tokens, index, num_tokens, each=True)
    if reduce not in REDUCTIONS:
        raise UnknownName("reduction", str(reduce), REDUCTIONS)
    if sizes is None:
        sizes = torch.ones(index.shape, device=tokens.device)
    elif sizes.shape != index.shape or not sizes.is_floating_point() or sizes.device != tokens.device:
        raise UsageError(
            f"sizes are {sizes.dtype} {tuple(sizes.shape)} on {sizes.device}, expected floating-point numbers "
            f"(B, N) = {tuple(index.shape)} on {tokens.device}"
        )
    merged_sizes = sizes.new_zeros(len(sizes), num_tokens).scatter_add(1, index.long(), sizes)
    share = sizes
    if reduce == "mean":
        share = sizes / merged_sizes.masked_fill(merged_sizes == 0, 1.0).gather(1, index.long())
    return Merged(_combined(tokens, share, index, num_tokens), merged_sizes)


def runs_triton(tensor: Tensor) -> bool:
    """Return whether the Triton kernels for tokens take a tensor: on a CUDA card of capability 8.0 or later."""
    if not tensor.is_cuda or tensor.dtype == torch.float64 or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= LEAST_CAPABILITY


def _combined(tokens: Tensor, weights: Tensor | None, index: Tensor, num_tokens: int) -> Tensor:
    """Return ``(B, M, C)``: the tokens, times their weights ``(B, N)``, added up at their index."""
    if runs_triton(tokens):
        from vislm.kernels.backends.triton.tokens import fused_combine

        return fused_combine(tokens, weights, index, num_tokens)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    rows = tokens.to(wide) if weights is None else tokens.to(wide) * weights[..., None].to(wide)
    batch, _, channels = tokens.shape
    total = rows.new_zeros(batch * num_tokens, channels)
    total = total.index_add(0, _flat(index, num_tokens), rows.reshape(-1, channels))
    return total.view(batch, num_tokens, channels).to(tokens.dtype)


def _rows_at(tokens: Tensor, index: Tensor) -> Tensor:
    batch, num_tokens, channels = tokens.shape
    rows = tokens.reshape(batch * num_tokens, channels).index_select(0, _flat(index, num_tokens))
    return rows.view(*index.shape, channels)


def _flat(index: Tensor, num_tokens: int) -> Tensor:
    """Return the indices into the batch's tokens laid end to end: far faster on a CPU than an index per channel."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * num_tokens).reshape(-1)


def _check(tokens: Tensor, index: Tensor, num_tokens: int, *, each: bool = False) -> None:
    if tokens.ndim != 3 or not tokens.is_floating_point():
        raise UsageError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}, expected floating-point (B, N, C)")
    if index.dtype not in (torch.int64, torch.int32) or index.device != tokens.device:
        raise UsageError(
            f"index is {index.dtype} on {index.device}, expected torch.int64 or torch.int32 on {tokens.device}"
        )
    expected = tuple(tokens.shape[:2]) if each else (tokens.shape[0], "K")
    if index.ndim != 2 or index.shape[0] != tokens.shape[0] or (each and index.shape[1] != tokens.shape[1]):
        raise UsageError(f"index has shape {tuple(index.shape)}, expected {expected} for tokens {tuple(tokens.shape)}")
    if num_tokens < 0:
        raise UsageError(f"{num_tokens=}, expected 0 or more")
    if index.device.type != "cpu" or index.numel() == 0 or torch.compiler.is_compiling():  # nothing to read, or a stall
        return
    if not 0 <= int(index.min()) <= int(index.max()) < num_tokens:
        raise UsageError(
            f"index holds values from {int(index.min())} to {int(index.max())}, expected 0 to {num_tokens - 1}"
        )
