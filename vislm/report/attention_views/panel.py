"""What is drawn for one query: arrays on the patch grid, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """An attention in the middle of a forward pass.

    Attributes:
        attention: the module, of ``vislm.attention``.
        x: ``(1, N, C)`` what it is given: prefix tokens, then the grid's tokens row-major.
        grid: patches along each axis, ``(h, w)``.
        significance: ``(1, h w)`` that self-guided attention is given; None for all others.
    """

    attention: Any
    x: Tensor
    grid: tuple[int, int]
    significance: Tensor | None = None

    @property
    def num_prefix(self) -> int:
        """Class and register tokens in front of the grid's."""
        return self.x.shape[1] - self.grid[0] * self.grid[1]

    def token(self, place: tuple[int, int]) -> int:
        """Return the index of a patch among the N tokens."""
        return self.num_prefix + place[0] * self.grid[1] + place[1]


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of a sheet: values over the image, and lines on it.

    Attributes:
        title: stands above it.
        note: stands below it.
        values: ``(h, w)`` by patch, NaN = not coloured; or small maps ``(rows, columns, h, w)``, side by side. None =
            the image itself.
        unit: what the values count, such as ``"% of the weights"``.
        classes: names of the values 0, 1, .. where these are no amounts.
        labels: one for each of the small maps, row by row.
        regions: ``(h, w)`` integers; lines are drawn between different ones.
        frame: ``(h, w)`` bool; a strong line is drawn around it.
    """

    title: str
    note: str = ""
    values: np.ndarray | None = None
    unit: str = ""
    classes: Sequence[str] = ()
    labels: Sequence[str] = ()
    regions: np.ndarray | None = None
    frame: np.ndarray | None = None


@dataclass(frozen=True)
class Sheet:
    """What to draw.

    Attributes:
        title: headline.
        subtitle: under it.
        picture: what the model saw.
        grid: patches along each axis, ``(h, w)``.
        rows: for each query its place and its panels.
    """

    title: str
    subtitle: str
    picture: Image.Image
    grid: tuple[int, int]
    rows: Sequence[tuple[tuple[int, int], Sequence[Panel]]]


def tiles(grid: Sequence[int], size: Sequence[int], first: Sequence[int] = (0, 0)) -> np.ndarray:
    """Return regions ``(h, w)`` of a grid that is cut into tiles of ``size``, with a border at ``first``."""
    row, column = ((np.arange(side) - start) // step for side, step, start in zip(grid, size, first, strict=True))
    return (row - row.min())[:, None] * (column.max() - column.min() + 1) + (column - column.min())


def array(x: Tensor) -> np.ndarray:
    """Return a tensor as a float array."""
    return x.detach().double().cpu().numpy()
