"""Attention to a pooled map with a bias by relative position: the pooled half of MoH-ViT's aggregated attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vislm.attention.active_heads import attend_active
from vislm.kernels import attend

CHUNK = 2**22
"""Largest number of entries of the bias that are in memory at once."""


@dataclass(frozen=True)
class PooledGrid:
    """A grid, and the one it is pooled to: its sides over ``ratio``, rounded down, as adaptive average pooling does.

    A pooled token lies at the mean of its tokens' coordinates.
    """

    grid: tuple[int, int]
    ratio: int

    @property
    def sides(self) -> tuple[int, int]:
        """Sides of the pooled grid."""
        return max(self.grid[0] // self.ratio, 1), max(self.grid[1] // self.ratio, 1)

    def offsets(self) -> tuple[Tensor, Tensor]:
        """Return per axis the distances from pooled tokens to tokens, in ascending order, each once."""
        rows, columns = (_Axis(side, bins) for side, bins in zip(self.grid, self.sides, strict=True))
        return rows.distances(), columns.distances()

    def expanded(self, table: Tensor, start: int, end: int) -> Tensor:
        """Return ``(H, M, P + 1)``, the entries of a table ``(H, R, S)`` for M tokens from start to end, and a zero."""
        rows, columns = (_Axis(side, bins) for side, bins in zip(self.grid, self.sides, strict=True))
        tokens = torch.arange(start, end, device=table.device)
        row, column = rows.index(tokens // self.grid[1]), columns.index(tokens % self.grid[1])
        index = row[:, :, None] * table.shape[2] + column[:, None, :]
        entries = pad(table.flatten(1), (0, 1))
        index = pad(index.flatten(1), (0, 1), value=entries.shape[1] - 1)
        return entries.index_select(1, index.flatten()).unflatten(1, index.shape)


class _Axis:
    """Distances along one axis, counted in halves: a bin's tokens are neighbours, so their mean is a half or whole."""

    def __init__(self, side: int, bins: int) -> None:
        self.side, self.bins = side, bins
        self.step = 1 if side % bins else 2  # bins of one size lie a whole number of tokens apart
        self.lowest = -self._twice_the_mean(bins - 1)
        self.count = (2 * (side - 1) - self._twice_the_mean(0) - self.lowest) // self.step + 1

    def distances(self) -> Tensor:
        return (self.lowest + self.step * torch.arange(self.count)) / 2

    def index(self, positions: Tensor) -> Tensor:
        """Return which distance each token of ``positions`` ``(M,)`` has from each bin, ``(M, bins)``."""
        bins = torch.arange(self.bins, device=positions.device)
        return (2 * positions[:, None] - self._twice_the_mean(bins) - self.lowest) // self.step

    def _twice_the_mean(self, number: Any) -> Any:
        """Return first plus last token of a bin, as adaptive pooling has them."""
        return number * self.side // self.bins - (-(number + 1) * self.side // self.bins) - 1


def attend_pooled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    pooled: PooledGrid,
    window: tuple[Tensor, Tensor],
    kept: Tensor | None,
) -> Tensor:
    """Return ``(B, H, N, D)``, one softmax of each token's attention to its window and to the pooled tokens.

    The window takes part as one more pooled token, with its log-sum-exp for a logit and its output for a value. Some
    tokens are computed at a time, so that the expanded bias stays small.

    Args:
        query: ``(B, H, N, D)``, scaled.
        key: ``(B, H, P, D)`` of the pooled tokens.
        value: ``(B, H, P, D)``.
        table: ``(H, R, S)``, the bias over ``pooled.offsets()``.
        pooled: the two grids.
        window: output ``(B, H, N, D)`` and log-sum-exp ``(B, H, N)`` of the attention to the windows.
        kept: bool ``(B, N, E)``, which tokens use each of the last E heads; the other pairs are left out, and get any
            value. None = all pairs.
    """
    local, lse = window
    rough = lse.detach().bfloat16().to(lse)  # in two parts, for half precision to keep more of it
    logit = torch.stack((rough, lse - rough), dim=-1)
    query, key = torch.cat((query, logit.to(query)), dim=-1), pad(key, (0, 2, 0, 1))
    key[:, :, -1, -2:] = 1
    value = pad(value, (0, 1, 0, 1))
    value[:, :, -1, -1] = 1
    parts, step = [], max(1, CHUNK // (table.shape[0] * key.shape[2]))
    for start in range(0, query.shape[2], step):
        end = min(start + step, query.shape[2])
        bias, queries = pooled.expanded(table, start, end), query[:, :, start:end]
        if kept is not None:
            parts.append(attend_active(queries, key, value, kept[:, start:end], scale=1.0, bias=bias))
        else:
            parts.append(attend(queries, key, value, bias=bias[None], scale=1.0))
    output, share = torch.cat(parts, dim=2).split((local.shape[-1], 1), dim=-1)
    return output + share * local
