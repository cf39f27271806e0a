"""Attention rollout: how attention of all layers, with the residual streams around it, passes tokens on.

Source: Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, arXiv 2005.00928.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislm.analysis.rows import MatrixRows, RowSource, row_pieces
from vislm.errors import UsageError

Fusion = Literal["mean", "min", "max"]


@dataclass(frozen=True)
class Rollout:
    """Options: M = residual I + (1 - residual) fused attention, rows summing to one; R = M_L ... M_start."""

    residual: float = 0.5
    fusion: Fusion = "mean"
    """How a layer's heads become one map."""
    discard: float = 0.0
    """Share of each row's entries, the smallest, that is set to zero before the rows are divided by their sums."""
    start: int = 0
    """First layer."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.residual <= 1.0 or not 0.0 <= self.discard < 1.0:
            raise UsageError(f"residual={self.residual}, discard={self.discard}: expected shares from 0 to 1")
        if self.fusion not in ("mean", "min", "max"):
            raise UsageError(f"fusion={self.fusion!r}: expected 'mean', 'min' or 'max'")

    def step(self, attention: Tensor, index: Tensor) -> Tensor:
        """Return rows (B, R, T) of M for rows index (R,) of attention (B, H, R, T)."""
        fused = {"mean": attention.mean, "min": attention.amin, "max": attention.amax}[self.fusion](1)
        lost = int(self.discard * fused.shape[-1])
        if lost:
            fused = fused.scatter(-1, fused.topk(lost, dim=-1, largest=False).indices, 0.0)
        identity = (torch.arange(fused.shape[-1], device=fused.device) == index.to(fused.device)[:, None]).float()
        rows = self.residual * identity + (1.0 - self.residual) * fused
        return rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)

    def matrix(self, layers: Sequence[RowSource | Tensor]) -> Tensor:
        """Return R (B, T, T) of all layers' attentions (first layer first). Holds T x T numbers."""
        sources = self._checked(layers)
        result: Tensor | None = None
        for source in sources:
            step = torch.cat([self.step(rows, index) for index, rows in row_pieces(source)], 1)
            result = step if result is None else step @ result
        assert result is not None
        return result

    def row(self, layers: Sequence[RowSource | Tensor], query: int) -> Tensor:
        """Return the row ``query`` of R, (B, T), from the last layer backwards: never a T x T matrix."""
        sources = self._checked(layers)
        tokens = sources[0].shape[2]
        row: Tensor | None = None
        for source in reversed(sources):
            if row is None:
                index = torch.tensor([query % tokens])
                row = self.step(source.rows(index), index)[:, 0]
                continue
            passed = torch.zeros_like(row)
            for index, rows in row_pieces(source):
                passed = passed + (row[:, None, index.to(row.device)] @ self.step(rows, index))[:, 0]
            row = passed
        assert row is not None
        return row

    def _checked(self, layers: Sequence[RowSource | Tensor]) -> list[RowSource]:
        sources = [MatrixRows(layer) if isinstance(layer, Tensor) else layer for layer in layers][self.start :]
        if not sources:
            raise UsageError(f"start={self.start}: there are {len(layers)} layers")
        shapes = {(s.shape[0], *s.shape[2:]) for s in sources}
        if len(shapes) > 1 or sources[0].shape[2] != sources[0].shape[3]:
            raise UsageError(
                f"rollout multiplies the maps of all layers; they have (samples, queries, keys) {sorted(shapes)}. "
                "Tokens that come or go on the way (pruning, stages of other resolution) have no rollout"
            )
        return sources


def causal_uniform_row(tokens: int, layers: int, residual: float = 0.5) -> Tensor:
    """Return the last row (T,) of the rollout of uniform causal attention: what position alone gives a token.

    Early tokens dominate the rollout of a causal model by construction; divide by this to compare tokens.
    """
    row = torch.zeros(tokens, dtype=torch.float64)
    row[-1] = 1.0
    counts = torch.arange(1, tokens + 1, dtype=torch.float64)
    for _ in range(layers):
        handed = (row / counts).flip(0).cumsum(0).flip(0)
        row = residual * row + (1.0 - residual) * handed
    return row.float()
