"""Blocked attention: all queries of a block share the keys of the block and of a halo around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vislm.errors import UnknownName, UsageError
from vislm.kernels.patterns.grid import GridPattern, checked_grid, checked_prefix, per_axis

BORDERS = ("mask", "zero")


@dataclass(frozen=True)
class Blocked(GridPattern):
    """Haloed block attention on a 1-D, 2-D or 3-D grid.

    Args:
        grid: keys along each axis; tokens are row-major.
        block: keys along each axis of a block; one number for all axes, or one each. A last partial block is fine with
            ``border="mask"``.
        halo: further keys on each side of the block.
        query_stride: keys per query along each axis: the queries stand on a grid of ``grid / query_stride``.
        border: ``"mask"`` hides what lies outside the grid; ``"zero"`` surrounds the grid with zero keys and values,
            which take their share of the softmax (as HaloNet in timm does).
        prefix: class, register or text tokens in front: seen by every query, seeing every key.
        padded: the *keys* of the call already carry ``halo`` zero rows around the grid. :func:`vislm.attend` adds them
            for ``border="zero"``, so that this is never given by hand.

    Raises:
        UsageError: values that do not fit together.

    Source: HaloNet (arXiv 2103.12731); ``timm.layers.halo_attn``.
    """

    grid: tuple[int, ...]
    block: tuple[int, ...]
    halo: tuple[int, ...]
    query_stride: tuple[int, ...]
    border: Literal["mask", "zero"]
    prefix: int
    padded: bool

    def __init__(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        halo: int | Sequence[int] = 0,
        *,
        query_stride: int | Sequence[int] = 1,
        border: Literal["mask", "zero"] = "mask",
        prefix: int = 0,
        padded: bool = False,
    ) -> None:
        sizes = checked_grid("Blocked", grid)
        fields = {
            "grid": sizes,
            "block": per_axis("block", block, sizes, 1),
            "halo": per_axis("halo", halo, sizes, 0),
            "query_stride": per_axis("query_stride", query_stride, sizes, 1),
            "border": border,
            "prefix": checked_prefix(prefix),
            "padded": padded,
        }
        for name, entry in fields.items():
            object.__setattr__(self, name, entry)
        if border not in BORDERS:
            raise UnknownName("border", str(border), BORDERS)
        for axis, size in enumerate(sizes):
            block_size, stride = self.block[axis], self.query_stride[axis]
            if block_size > size:
                raise UsageError(f"block {block_size} is larger than axis {axis} of the grid {sizes}")
            if block_size % stride or size % stride:
                raise UsageError(
                    f"query_stride {stride} does not divide block {block_size} and size {size} of axis {axis}"
                )
            if border == "zero" and size % block_size:
                raise UsageError(
                    f"border='zero' needs a grid of whole blocks, but axis {axis} has {size} keys and blocks of "
                    f"{block_size}; pad the map to a multiple, or use border='mask'"
                )

    @property
    def query_grid(self) -> tuple[int, ...]:
        """Number of queries along each axis."""
        return tuple(size // stride for size, stride in zip(self.grid, self.query_stride, strict=True))

    @property
    def margin(self) -> tuple[int, ...]:
        """Number of zero keys on each side of each axis."""
        return self.halo if self.padded else (0,) * len(self.grid)

    def span(self, axis: int, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and last key coordinate of the block and its halo; see :class:`GridPattern`."""
        block, halo = self.block[axis], self.halo[axis]
        start = position // (block // self.query_stride[axis]) * block
        first, last = start - halo, start + block - 1 + halo
        if self.border == "mask":
            first, last = first.clamp_min(0), last.clamp_max(self.grid[axis] - 1)
        return first, last

    def anchor(self, axis: int, position: Tensor) -> Tensor:
        """Return the block's first key plus the query's place in the block, counted in queries as in timm."""
        block, stride = self.block[axis], self.query_stride[axis]
        queries = block // stride
        return position // queries * block + position % queries
