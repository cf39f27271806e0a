"""Neighborhood attention: a window of keys around each query, pushed inward at the borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vislm.errors import UnknownName, UsageError
from vislm.kernels.patterns.grid import GridPattern, checked_grid, checked_prefix, per_axis

BORDERS = ("shift", "mask")


@dataclass(frozen=True)
class Neighborhood(GridPattern):
    """Generalized neighborhood attention on a 1-D, 2-D or 3-D grid.

    Along each axis a query sees ``window`` keys, every ``dilation``-th one, centred on it (an even window reaches one
    key further back than ahead). Near a border the window is pushed inward, so that it always holds ``window`` keys.
    With ``stride`` s, groups of s neighbouring queries share the window of their middle one; s = window is blocked
    attention. A causal axis sees the query itself and up to ``window - 1`` keys before it.

    Args:
        grid: patches along each axis, such as ``(H, W)``; tokens are row-major.
        window: keys along each axis; one number for all axes, or one each. ``window * dilation <= grid``.
        stride: queries that share a window, 1 to ``window``.
        dilation: distance between the window's keys.
        causal: hide later keys, for all axes or one flag each.
        border: ``"shift"`` as published, or ``"mask"``: the window stays centred and loses the keys outside the grid.
        prefix: class, register or text tokens in front: seen by every query, seeing every key.

    Raises:
        UsageError: a window that is larger than the grid, and other values that do not fit.

    Source: NAT (arXiv 2204.07143), DiNAT (2209.15001), GNA (2504.16922); https://github.com/SHI-Labs/NATTEN.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    border: Literal["shift", "mask"]
    prefix: int

    def __init__(
        self,
        grid: int | Sequence[int],
        window: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        border: Literal["shift", "mask"] = "shift",
        prefix: int = 0,
    ) -> None:
        sizes = checked_grid("Neighborhood", grid)
        fields = {
            "grid": sizes,
            "window": per_axis("window", window, sizes, 1),
            "stride": per_axis("stride", stride, sizes, 1),
            "dilation": per_axis("dilation", dilation, sizes, 1),
            "causal": _flags(causal, sizes),
            "border": border,
            "prefix": checked_prefix(prefix),
        }
        for name, entry in fields.items():
            object.__setattr__(self, name, entry)
        if border not in BORDERS:
            raise UnknownName("border", str(border), BORDERS)
        for axis, size in enumerate(sizes):
            reach = self.window[axis] * self.dilation[axis]
            if reach > size:
                raise UsageError(
                    f"window {self.window[axis]} x dilation {self.dilation[axis]} = {reach} is larger than axis {axis} "
                    f"of the grid {sizes}; use a window of at most {size // self.dilation[axis]} there"
                )
            if self.stride[axis] > self.window[axis]:
                raise UsageError(
                    f"stride {self.stride[axis]} is larger than the window {self.window[axis]} of axis {axis}; "
                    "expected 1 <= stride <= window"
                )

    def step(self, axis: int) -> int:
        """Return the axis' dilation."""
        return self.dilation[axis]

    def span(self, axis: int, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and last key coordinate of the window; see :class:`GridPattern`."""
        size, window, stride, dilation = self.grid[axis], self.window[axis], self.stride[axis], self.dilation[axis]
        # Keys of the query's dilation group only: inside it, everything is counted in steps of the dilation.
        group, query = position % dilation, position // dilation
        last = (size - group + dilation - 1) // dilation - 1
        leader = query // stride * stride
        if self.causal[axis]:
            leader = torch.minimum(leader + stride - 1, last)
            return group + dilation * (leader - (window - 1)).clamp_min(0), position
        start = torch.minimum(leader + stride // 2, last) - window // 2
        end = start + window - 1
        if self.border == "shift":
            start = torch.minimum(start.clamp_min(0), last + 1 - window)
            end = start + window - 1
        else:
            start, end = start.clamp_min(0), torch.minimum(end, last)
        return group + dilation * start, group + dilation * end


def _flags(causal: bool | Sequence[bool], grid: tuple[int, ...]) -> tuple[bool, ...]:
    flags = tuple(causal) if isinstance(causal, Sequence) else (causal,) * len(grid)
    if len(flags) != len(grid) or not all(isinstance(flag, bool) for flag in flags):
        raise UsageError(f"{causal=}, expected a bool, or one per axis of the grid {grid}")
    return flags
