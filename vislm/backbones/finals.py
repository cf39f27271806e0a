"""What closes the last stage, in front of the head: ``forward(x)`` with x ``(B, N, C)``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import silu

from vislm.attention.pointwise import Pointwise
from vislm.backbones.config import HierarchicalConfig
from vislm.backbones.norms import BatchNorm


class LayerNormFinal(nn.LayerNorm):
    """LayerNorm of each token."""

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__(config.stages[-1].dim, config.norm_eps)
        self.num_features = config.stages[-1].dim

    def macs(self, grid: Sequence[int]) -> int:
        """Return 0: no matrix is multiplied."""
        return 0


class IdentityFinal(nn.Identity):
    """Nothing (PVT)."""

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__()
        self.num_features = config.stages[-1].dim

    def macs(self, grid: Sequence[int]) -> int:
        """Return 0."""
        return 0


class ProjectionFinal(BatchNorm):
    """``silu(batch_norm(proj(x)))``, a wider feature for the classifier (STViT).

    Source: arXiv 2211.11167; hhb072/STViT.
    """

    def __init__(self, config: HierarchicalConfig, num_features: int = 1024) -> None:
        super().__init__(num_features)
        self.proj = Pointwise(config.stages[-1].dim, num_features)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(B, N, num_features)`` for input ``(B, N, C)``."""
        return silu(super().forward(self.proj(input)))

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image."""
        return math.prod(grid) * self.proj.weight.numel()


FINALS = {"identity": IdentityFinal, "layer_norm": LayerNormFinal, "projection": ProjectionFinal}
"""Name -> component."""
