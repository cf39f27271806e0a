"""Sums over whole attention matrices, taken without holding one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.lmm.decoder.attention import AttentionCall


@dataclass
class MatrixSums:
    """Sums over the square attention matrices of B samples and H heads, collected a few rows at a time."""

    trace: Tensor
    """(B, H)."""
    squares: Tensor
    """(B, H): the squared Frobenius norm."""
    total: Tensor
    """(B, H): the sum of all entries."""
    size: Tensor
    """(B,): rows."""

    @classmethod
    def zero(cls, shape: torch.Size, size: Tensor) -> MatrixSums:
        """Return sums over nothing yet, for ``shape`` (B, H) and ``size`` (B,)."""
        trace, squares, total = (torch.zeros(shape, device=size.device) for _ in range(3))
        return cls(trace, squares, total, size)

    @classmethod
    def of(cls, attention: Tensor) -> MatrixSums:
        """Return the sums over attention (B, H, T, T)."""
        rows = torch.arange(attention.shape[-1], device=attention.device)
        sums = cls.zero(attention.shape[:2], torch.full(attention.shape[:1], len(rows), device=attention.device))
        sums.add(attention, rows)
        return sums

    def add(self, weights: Tensor, rows: Tensor) -> None:
        """Add rows (R,) of the matrices: weights (B, H, R, K), zero where a row does not count."""
        self.trace = self.trace + weights.gather(-1, rows[:, None].expand(*weights.shape[:3], 1)).sum((-2, -1))
        self.squares = self.squares + weights.square().sum((-2, -1))
        self.total = self.total + weights.sum((-2, -1))


def logit_squares(call: AttentionCall, valid: Tensor) -> Tensor:
    """Return (B, H): the squared Frobenius norm of the unmasked logits between the prefill's valid columns.

    ||Q K'||^2 is the inner product of Q'Q and K'K, which are d x d.

    Args:
        call: of a prefill.
        valid: (B, Nq) bool: columns that are no padding.
    """
    keep = valid[:, None, :, None]
    query = torch.where(keep, call.query.float(), 0.0) * call.scale
    key = torch.where(keep, call.key[:, :, : valid.shape[1]].float(), 0.0)
    grams = (key.transpose(2, 3) @ key).repeat_interleave(query.shape[1] // key.shape[1], 1)
    return ((query.transpose(2, 3) @ query) * grams).sum((-2, -1))
