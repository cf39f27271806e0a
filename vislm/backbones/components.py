"""What the parts of a hierarchical backbone look like; they are ``nn.Module``s found by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Stem(Protocol):
    """From an image to tokens."""

    reduction: int
    """Pixels per token along each side."""
    first_conv: str
    """Name of the convolution of the image, for timm."""

    def __call__(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N, C)`` and their grid for images ``(B, 3, H, W)``."""
        ...

    def macs(self, size: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds for an image of ``size``, and the grid."""
        ...


class Downsampler(Protocol):
    """Between two stages."""

    def __call__(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens ``(B, N / 4, C')`` and their grid, half the sides rounded up."""
        ...

    def macs(self, grid: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the multiply-adds of one image, and the grid behind."""
        ...


class Final(Protocol):
    """Between the last stage and the head."""

    num_features: int
    """Width behind it."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return tokens ``(B, N, num_features)`` for x ``(B, N, C)``."""
        ...

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image."""
        ...


class Branch(Protocol):
    """A block's attention or feed-forward branch."""

    def __call__(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return ``(B, N, C)`` for x ``(B, N, C)``."""
        ...

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image."""
        ...


class Block(Protocol):
    """Attention and feed-forward branch of one layer, with their norms and shortcuts.

    A block with a true attribute ``relays`` hands something on to the next block of its stage: it is called with what
    the one before handed on (or None) as a third argument, and returns a pair.
    """

    def __call__(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return ``(B, N, C)`` for x ``(B, N, C)``."""
        ...

    def macs(self, grid: Sequence[int]) -> int:
        """Return the multiply-adds of one image."""
        ...
