"""Patterns on a plain sequence: everything, the past, the valid tokens, an explicit mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.kernels.shapes import Shape, check_bool, check_broadcast, four_axes


@dataclass(frozen=True)
class Dense:
    """Every query sees every key."""

    def mask(self, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Return an all-true mask; see :meth:`Pattern.mask`."""
        return torch.ones_like(query_index, dtype=torch.bool) & torch.ones_like(key_index, dtype=torch.bool)

    def fit(self, shape: Shape) -> Dense:
        """Return itself: fits every shape."""
        return self


@dataclass(frozen=True)
class Causal:
    """A query sees the keys up to its own position: query ``i`` sees key ``j`` iff ``j <= i + Nk - Nq``.

    With ``Nq < Nk`` this is decoding behind a cache; with ``Nq > Nk`` the first ``Nq - Nk`` queries see nothing and
    give zeros.
    """

    def mask(self, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Return ``key_index <= query_index``; see :meth:`Pattern.mask`."""
        return key_index <= query_index

    def fit(self, shape: Shape) -> Causal:
        """Return itself: fits every shape."""
        return self


@dataclass(frozen=True, eq=False)
class Padded:
    """A query sees the valid keys of its sample, with ``causal=True`` only those up to its own position.

    Args:
        valid: bool ``(B, Nk)``, True = token, False = padding; left, right and scattered padding are all fine.
        causal: also apply :class:`Causal`.

    Only keys are hidden. A padded query still gets an output, or zeros where it sees nothing.
    """

    valid: Tensor
    causal: bool = False

    def mask(self, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Return ``valid[b, key_index]``, and the causal condition if asked; see :meth:`Pattern.mask`."""
        visible = self.valid[_along(self.valid, 0), key_index]
        return visible & (key_index <= query_index) if self.causal else visible

    def fit(self, shape: Shape) -> Padded:
        """Return itself after checking that ``valid`` is bool ``(B, Nk)`` on the call's device."""
        check_bool("Padded.valid", self.valid, shape.device)
        if self.valid.shape != (shape.batch, shape.num_keys):
            raise UsageError(
                f"Padded.valid has shape {tuple(self.valid.shape)}, expected (B, Nk) = {(shape.batch, shape.num_keys)}"
            )
        return self


@dataclass(frozen=True, eq=False)
class Masked:
    """An explicit mask: ``allowed`` is bool and broadcasts to ``(B, Hq, Nq, Nk)``, True = may attend."""

    allowed: Tensor

    def mask(self, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Return the chosen entries of ``allowed``, whose last two sizes are ``(Nq, Nk)`` after :meth:`fit`."""
        allowed = four_axes(self.allowed)
        num_queries, num_keys = allowed.shape[-2:]
        return allowed[_along(allowed, 0), _along(allowed, 1), query_index - (num_keys - num_queries), key_index]

    def fit(self, shape: Shape) -> Masked:
        """Return the pattern with ``allowed`` viewed as ``(B or 1, Hq or 1, Nq, Nk)``; copies nothing."""
        check_bool("Masked.allowed", self.allowed, shape.device)
        check_broadcast("Masked.allowed", self.allowed, shape)
        return Masked(four_axes(self.allowed).expand(-1, -1, shape.num_queries, shape.num_keys))


def _along(tensor: Tensor, axis: int) -> Tensor:
    """Return the indices of one axis of a (B, H, ...) tensor, shaped to broadcast along that axis of four."""
    view = [1, 1, 1, 1]
    view[axis] = -1
    return torch.arange(tensor.shape[axis], device=tensor.device).view(view)
