"""Rows of attention, a few at a time, from whatever computes them: so that sums over a matrix never hold one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vislm.errors import UsageError

PIECE = 2**22
"""Weights that are held at once (16 MiB in float32)."""


class RowSource(Protocol):
    """An attention of B samples, H heads, Q queries and K keys, of which rows can be asked for."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q, K)."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """Return the softmaxed rows (B, H, R, K) of the queries index (R,), float32."""
        ...


@dataclass(frozen=True)
class MatrixRows:
    """An attention whose matrix (B, H, Q, K) is there."""

    attention: Tensor

    def __post_init__(self) -> None:
        if self.attention.dim() != 4:
            raise UsageError(f"attention has shape {tuple(self.attention.shape)}, expected (B, H, Q, K)")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q, K)."""
        batch, heads, queries, keys = self.attention.shape
        return batch, heads, queries, keys

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows (B, H, R, K), float32."""
        return self.attention[:, :, index].float()


def row_pieces(source: RowSource, index: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pieces of the queries, and their rows: (R,) and (B, H, R, K).

    Args:
        source: the attention.
        index: queries wanted; None: all.
    """
    batch, heads, queries, keys = source.shape
    everyone = torch.arange(queries) if index is None else index
    for piece in everyone.split(max(1, PIECE // max(1, batch * heads * keys))):
        yield piece, source.rows(piece)
