"""What inference computes from parameters alone, kept from one forward pass to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

LIMIT = 2**18
"""Largest result that is kept, in numbers: a model of many layers should not grow by much."""


class Remembered:
    """The last result of a function of some parameters and of a key.

    It is computed anew for gradients, while a graph is captured, off the CPU (where comparing would stall), and
    whenever a parameter has another value, however it was changed.
    """

    def __init__(self) -> None:
        self._last: tuple[Hashable, list[Tensor], Tensor] | None = None

    def __call__(self, key: Hashable, parameters: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """Return ``compute()``, or what it returned last for the same key and equal parameters."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or parameters[0].device.type != "cpu":
            return compute()
        last = self._last  # one name for all of it: another thread may put in its own
        if last is not None and last[0] == key and _equal(parameters, last[1]):
            return last[2]
        result = compute()
        if result.numel() <= LIMIT:
            self._last = key, [parameter.detach().clone() for parameter in parameters], result
        return result

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        return Remembered, ()  # a copied or saved module starts anew


def _equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
