"""1x1 convolutions of tokens."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear


class Pointwise(nn.Conv2d):
    """A 1x1 convolution that takes tokens ``(B, N, C)``, prefix tokens too: a linear map of each.

    Parameters have a convolution's shapes and initial distribution.
    """

    def __init__(self, dim: int, dim_out: int, bias: bool = True) -> None:
        super().__init__(dim, dim_out, 1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(B, N, C_out)`` for input ``(B, N, C)``."""
        return pointwise(self, input)


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return ``(B, N, C_out)``, a 1x1 convolution of tokens ``(B, N, C)``: a matrix product, which is faster."""
    return linear(x, conv.weight.flatten(1), conv.bias)
