"""A learned factor per channel of a residual branch.

Source: CaiT (arXiv 2103.17239).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiplies each channel of a branch by a learned ``gamma (C,)``, small at first."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``gamma * x`` for x ``(..., C)``."""
        return self.gamma * x
