"""Feed-forward branches with a depthwise convolution inside: SG-Former's and MoH-ViT's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from vislm.attention.tokens import to_map, to_tokens
from vislm.backbones.slices import by_rows


class ResidualConvMlp(nn.Module):
    """``fc2(gelu(u + DW_3(u)))`` with ``u = fc1(x)``, a hidden width of ``int(ratio * dim)`` (SG-Former).

    Source: arXiv 2308.12216; OliverRensu/SG-Former.
    """

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(ratio * dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return ``(B, N, C)`` for the grid's tokens ``(B, N, C)``."""

        def middle(hidden: Tensor, rows: Sequence[int]) -> Tensor:
            return self.act(hidden + _convolved(self.dwconv, hidden, rows))

        return by_rows(x, grid, self.dwconv.out_channels, self.fc1, middle, self.fc2)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image."""
        return math.prod(grid) * sum(part.weight.numel() for part in (self.fc1, self.dwconv, self.fc2))


class ConvGlu(nn.Module):
    """``fc2(gelu(DW_3(u)) * v)`` with ``[u | v] = fc1(x)``, each ``int(2 ratio dim / 3)`` wide (TransNeXt, MoH-ViT).

    Source: arXiv 2311.17132 and 2410.11842; SkyworkAI/MoH.
    """

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(2 * int(ratio * dim) / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return ``(B, N, C)`` for the grid's tokens ``(B, N, C)``."""

        def middle(both: Tensor, rows: Sequence[int]) -> Tensor:
            hidden, gate = both.chunk(2, dim=-1)
            return self.act(_convolved(self.dwconv, hidden.contiguous(), rows)) * gate

        return by_rows(x, grid, 2 * self.dwconv.out_channels, self.fc1, middle, self.fc2)

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image."""
        return math.prod(grid) * sum(part.weight.numel() for part in (self.fc1, self.dwconv, self.fc2))


def _convolved(conv: nn.Conv2d, x: Tensor, grid: Sequence[int]) -> Tensor:
    return to_tokens(conv(to_map(x, grid)))
