"""Large-kernel attention: each token is multiplied by what a large, decomposed convolution makes of its surroundings.

Source: "Visual Attention Network" (arXiv 2202.09741); https://github.com/Visual-Attention-Network/VAN-Classification.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import gelu

from vislm.attention.dilated import dilated
from vislm.attention.pointwise import Pointwise, pointwise
from vislm.attention.tokens import check_tokens, on_grid, to_map, to_tokens
from vislm.errors import UsageError


class LargeKernelAttention(nn.Module):
    """``x + proj_2(LKA(gelu(proj_1(x))))``, on maps of any size.

    Args:
        dim: width C.
        num_heads: there for the signature that all attentions share: a gate has no heads.
        kernel_size: K, tokens along each side of the field that a token sees.
        dilation: d; K x K is done by a (2d - 1) x (2d - 1) convolution and one of ceil(K / d) tokens, d apart.
        shortcut: add the input, as published; False in the place of an attention, whose block alone adds it.
        num_prefix_tokens: class and register tokens in front. A convolution of the map does not see them: they are
            returned as they are, and nothing of the map reaches them.

    The state dict has the official names: ``proj_1, spatial_gating_unit.{conv0, conv_spatial, conv1}, proj_2``.

    Raises:
        UsageError: a kernel that has no centre.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        kernel_size: int = 21,
        *,
        dilation: int = 3,
        shortcut: bool = True,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.shortcut, self.num_prefix_tokens = dim, shortcut, num_prefix_tokens
        self.proj_1 = Pointwise(dim, dim)
        self.spatial_gating_unit = LargeKernelGate(dim, kernel_size, dilation)
        self.proj_2 = Pointwise(dim, dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the output ``(B, N, C)``.

        Args:
            x: ``(B, N, C)``: prefix tokens, then the grid's tokens row-major.
            grid: ``(H, W)``.
        """
        grid = check_tokens(x, grid, self.dim, self.num_prefix_tokens, 2)
        return on_grid(x, self.num_prefix_tokens, lambda p: self._branch(p, grid))

    def _branch(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        inner = to_map(gelu(self.proj_1(x)), grid)
        gated = self.proj_2(to_tokens(self.spatial_gating_unit(inner)))
        return x + gated if self.shortcut else gated

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image: all convolutions."""
        return math.prod(grid) * sum(parameter.numel() for parameter in self.parameters() if parameter.ndim > 1)


class LargeKernelGate(nn.Module):
    """``LKA(x) = x * conv1(conv_spatial(conv0(x)))``: depthwise, depthwise with gaps, 1x1; with biases, zero padding.

    Args:
        dim: width C.
        kernel_size: K.
        dilation: d.
    """

    def __init__(self, dim: int, kernel_size: int = 21, dilation: int = 3) -> None:
        super().__init__()
        near, far = 2 * dilation - 1, math.ceil(kernel_size / max(1, dilation))
        if dilation < 1 or kernel_size < 1 or far % 2 == 0:
            raise UsageError(
                f"{kernel_size=}, {dilation=}: ceil(kernel_size / dilation) = {far}, expected an odd number, so that "
                "the kernel has a centre; the published ones are 21 and 3"
            )
        self.conv0 = nn.Conv2d(dim, dim, near, padding=near // 2, groups=dim)
        self.conv_spatial = nn.Conv2d(dim, dim, far, padding=far // 2 * dilation, groups=dim, dilation=dilation)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated map ``(B, C, H, W)`` for x ``(B, C, H, W)``."""
        field = dilated(self.conv_spatial, self.conv0(x))
        return x * to_map(pointwise(self.conv1, to_tokens(field)), x.shape[2:])
