"""Normalisations of tokens ``(B, N, C)`` in front of a block's branches, built with width and ``norm_eps``."""

from __future__ import annotations

from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """Each channel over all tokens of the batch, in evaluation by its running statistics; eps is always 1e-5."""

    def __init__(self, dim: int, norm_eps: float = 1e-5) -> None:
        super().__init__(dim)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(B, N, C)`` for input ``(B, N, C)``."""
        # A map of one row, which is a view in channels-last order: nothing is copied.
        return super().forward(input.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)


NORMS: dict[str, type[nn.LayerNorm] | type[BatchNorm]] = {"layer": nn.LayerNorm, "batch": BatchNorm}
"""Name -> normalisation."""
