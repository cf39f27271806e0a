"""A learned bias as low-rank factors, head by head: some heads need one channel, others nearly all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.kernels.bias import HeadwiseBias, LowRankBias


@dataclass(frozen=True, eq=False)
class BiasReport:
    """What a factorisation keeps of each head; ``print(report)`` shows it as a table.

    Its tensors lie on the CPU.

    Attributes:
        rank: int64 ``(H,)``, the channels that the head needs for the energy asked for.
        low_rank: bool ``(H,)``, whether the head is stored in factors; the others are stored as they were.
        energy: float64 ``(H,)``, the share of the sum of squared singular values that is stored, 1 for dense heads.
        max_error: float64 ``(H,)``, the largest absolute difference of stored and given bias, 0 for dense heads.
    """

    rank: Tensor
    low_rank: Tensor
    energy: Tensor
    max_error: Tensor

    def __str__(self) -> str:
        lines = [f"{'head':>4} {'rank':>5} {'stored':>8} {'energy':>8} {'max error':>10}"]
        for head, rank in enumerate(self.rank.tolist()):
            stored = "factors" if self.low_rank[head] else "dense"
            lines.append(f"{head:>4} {rank:>5} {stored:>8} {self.energy[head]:>8.5f} {self.max_error[head]:>10.3g}")
        return "\n".join(lines)


class FactorizedBias(NamedTuple):
    """What :func:`factorize_bias` returns: a bias for ``attend``, and what became of each head."""

    bias: LowRankBias | HeadwiseBias | Tensor
    report: BiasReport


def factorize_bias(bias: Tensor, energy: float = 0.995, max_rank: int = 16, *, balance: float = 0.5) -> FactorizedBias:
    """Return a learned bias with every head of low rank in factors, and a report.

    Of each head as many singular values are kept as hold ``energy`` of the sum of their squares. A head that needs
    more than ``max_rank`` stays dense: ranks differ a hundredfold between the heads of one layer. The result is a
    constant (no gradient flows back to ``bias``); its factors may be trained on.

    Args:
        bias: ``(H, Nq, Nk)``, the bias of one layer, materialised once.
        energy: in (0, 1].
        max_rank: of a head in factors.
        balance: ``B_q = U S^balance``, ``B_k = V S^(1 - balance)``; 1/2 suits half precision.

    Returns:
        ``(bias, report)``; the bias is a ``LowRankBias`` if all heads are of low rank, a dense tensor
        ``(1, H, Nq, Nk)`` if none is, else a ``HeadwiseBias``. Its dtype is that of the input.
    """
    _check(bias, balance)
    if not 0.0 < energy <= 1.0:
        raise UsageError(f"{energy=}, expected a share of the energy in (0, 1]")
    if max_rank < 1:
        raise UsageError(f"{max_rank=}, expected at least 1")
    given = bias.detach()
    left, values, right = _svd(given)
    kept = _kept_energy(values)
    rank = 1 + (kept < energy).sum(-1)
    low = rank <= max_rank
    report = BiasReport(rank, low, torch.ones_like(kept[:, 0]), torch.zeros_like(kept[:, 0]))
    if not low.any():
        return FactorizedBias(given[None], report)
    # Heads in factors share one width; what a head does not need of it is 0.
    needed = values * (torch.arange(values.shape[-1], device=values.device) < rank[:, None])
    factors = _factors(left[low], needed[low], right[low], int(rank[low].max()), balance, given)
    report.energy[low] = kept.gather(-1, rank[:, None] - 1)[low, 0]
    report.max_error[low] = _max_error(factors, given[low])
    if low.all():
        return FactorizedBias(factors, report)
    heads, others = (tuple(chosen.nonzero()[:, 0].tolist()) for chosen in (low, ~low))
    return FactorizedBias(HeadwiseBias(factors, heads, given[~low][None], others), report)


def truncated_bias(bias: Tensor, rank: int, *, balance: float = 0.5) -> LowRankBias:
    """Return the best approximation of a bias ``(H, Nq, Nk)`` with ``rank`` channels in every head, as a constant."""
    _check(bias, balance)
    if not 1 <= rank <= min(bias.shape[1:]):
        raise UsageError(f"{rank=}, expected 1 to min(Nq, Nk) = {min(bias.shape[1:])}")
    return _factors(*_svd(bias.detach()), rank, balance, bias)


def spectrum(bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values of a bias ``(H, Nq, Nk)``, largest first, and the share of the energy up to each.

    Both are float64 ``(H, min(Nq, Nk))``; the energy is the sum of squared singular values.
    """
    _check(bias)
    values = _svd(bias.detach())[1]
    return values, _kept_energy(values)


def _svd(bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U (H, Nq, K)``, ``S (H, K)``, ``V (H, Nk, K)`` in float64 on the CPU."""
    wide = bias.cpu() if bias.device.type == "mps" else bias  # Apple's GPUs have no float64
    left, values, right = torch.linalg.svd(wide.double(), full_matrices=False)
    return left.cpu(), values.cpu(), right.transpose(-1, -2).cpu()


def _kept_energy(values: Tensor) -> Tensor:
    energy = values.square().cumsum(-1)
    total = energy[:, -1:]
    return torch.where(total > 0, energy / total, 1.0)


def _factors(left: Tensor, values: Tensor, right: Tensor, rank: int, balance: float, like: Tensor) -> LowRankBias:
    """Return the first ``rank`` channels, with the dtype and device of ``like``."""
    left, values, right = left[..., :rank], values[:, None, :rank], right[..., :rank]
    query_factor = left * values**balance
    key_factor = right * values ** (1 - balance)
    query_factor, key_factor = (factor.to(like.dtype).to(like.device)[None] for factor in (query_factor, key_factor))
    return LowRankBias(query_factor, key_factor)


def _max_error(factors: LowRankBias, bias: Tensor) -> Tensor:
    """Return the largest error per head of the factors as stored, rounding included."""
    query_factor, key_factor = factors.query_factor[0].cpu().double(), factors.key_factor[0].cpu().double()
    return (query_factor @ key_factor.transpose(-1, -2) - bias.cpu().double()).abs().amax(dim=(-1, -2))


def _check(bias: Tensor, balance: float = 0.5) -> None:
    if not isinstance(bias, Tensor) or bias.ndim != 3 or not bias.is_floating_point() or 0 in bias.shape:
        given = f"{bias.dtype} {tuple(bias.shape)}" if isinstance(bias, Tensor) else repr(bias)
        raise UsageError(f"bias is {given}, expected floating-point (H, Nq, Nk), the bias of one layer")
    if not bias.isfinite().all():
        raise UsageError("bias holds infinities or NaN; a mask goes into pattern=Masked(mask), not into the bias")
    if not 0.0 <= balance <= 1.0:
        raise UsageError(f"{balance=}, expected a number in [0, 1]")
