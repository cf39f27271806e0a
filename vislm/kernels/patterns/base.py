"""What a pattern is: one method that defines it, and one that fits it to the tensors of a call."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from vislm.kernels.shapes import Shape


@runtime_checkable
class Pattern(Protocol):
    """Which pairs (query, key) attend.

    Positions are counted on the **key axis**: the queries are aligned to the end of the keys, as in decoding with a
    cache, so query ``i`` of ``Nq`` over ``Nk`` keys has position ``i + Nk - Nq`` (just ``i`` in self-attention). That
    is why a pattern needs no sizes to define itself.
    """

    def mask(self, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Return True where a query may attend to a key.

        Args:
            query_index: integer positions of the queries on the key axis, ``(Nq, 1)`` or ``(B, 1, Nq, 1)``.
            key_index: integer positions of the keys, ``(1, Nk)``.

        Returns:
            A bool tensor that broadcasts to ``(B, Hq, Nq, Nk)``.
        """
        ...

    def fit(self, shape: Shape) -> Pattern:
        """Return the pattern ready for a call of this shape; raise ``UsageError`` when it does not fit."""
        ...
