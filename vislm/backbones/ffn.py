"""Feed-forward branches of a block: ``forward(x, grid)`` with x ``(B, N, C)``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from vislm.backbones.ffn_conv import ConvGlu, ResidualConvMlp
from vislm.backbones.slices import by_tokens
from vislm.backbones.stvit import StvitMlp
from vislm.backbones.van import ConvMlp


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))`` with a hidden width of ``int(ratio * dim)``."""

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(ratio * dim))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(int(ratio * dim), dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return ``(B, N, C)``; the grid does not matter."""
        return by_tokens(x, self.fc1.out_features, lambda part: self.fc2(self.act(self.fc1(part))))

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image."""
        return math.prod(grid) * (self.fc1.weight.numel() + self.fc2.weight.numel())


FFNS = {
    "mlp": Mlp,
    "residual_conv": ResidualConvMlp,
    "conv_glu": ConvGlu,
    "conv_mlp": ConvMlp,
    "stvit": StvitMlp,
}
"""Name -> feed-forward branch."""
