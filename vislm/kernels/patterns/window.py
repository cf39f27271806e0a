"""Window attention: disjoint windows, plain or shifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vislm.errors import UsageError
from vislm.kernels.patterns.grid import GridPattern, checked_grid, checked_prefix, per_axis


@dataclass(frozen=True)
class Window(GridPattern):
    """Attention inside disjoint windows of a 1-D, 2-D or 3-D grid.

    ``shift`` moves the windows' borders; those at the grid's ends are cut, which is what Swin's cyclic roll with its
    mask computes. ``window=grid`` is full attention among the grid's tokens, for which relative position biases are
    then defined.

    Args:
        grid: patches along each axis; tokens are row-major.
        window: patches along each axis of a window; one number for all axes, or one each.
        shift: first border of the windows along each axis, 0 to ``window - 1``.
        prefix: class, register or text tokens in front: seen by every query, seeing every key.

    Raises:
        UsageError: values that do not fit together.

    Source: Swin (arXiv 2103.14030); ``timm.models.swin_transformer``.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    prefix: int

    def __init__(
        self,
        grid: int | Sequence[int],
        window: int | Sequence[int],
        shift: int | Sequence[int] = 0,
        *,
        prefix: int = 0,
    ) -> None:
        sizes = checked_grid("Window", grid)
        fields = {
            "grid": sizes,
            "window": per_axis("window", window, sizes, 1),
            "shift": per_axis("shift", shift, sizes, 0),
            "prefix": checked_prefix(prefix),
        }
        for name, entry in fields.items():
            object.__setattr__(self, name, entry)
        for axis, size in enumerate(sizes):
            if self.window[axis] > size:
                raise UsageError(f"window {self.window[axis]} is larger than axis {axis} of the grid {sizes}")
            if self.shift[axis] >= self.window[axis]:
                raise UsageError(
                    f"shift {self.shift[axis]} of axis {axis} is not smaller than its window {self.window[axis]}"
                )

    def span(self, axis: int, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and last key coordinate of the query's window; see :class:`GridPattern`."""
        window, shift = self.window[axis], self.shift[axis]
        start = torch.div(position - shift, window, rounding_mode="floor") * window + shift
        return start.clamp_min(0), (start + window - 1).clamp_max(self.grid[axis] - 1)
