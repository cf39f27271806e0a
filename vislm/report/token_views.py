"""Where an image's visual tokens lie in its picture, and what became of each at every stage of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vislm.lmm.adapters import Adapter
from vislm.lmm.adapters.base import Grid
from vislm.lmm.run import Run

DROPPED = -1
"""In place of a token's owner."""


@dataclass(frozen=True)
class View:
    """A rectangle of tokens that shows the whole picture."""

    name: str
    """Empty where there is only one."""
    tokens: np.ndarray
    """(rows, columns) int64: the token at each place."""


@dataclass(frozen=True)
class Fate:
    """What is left of n tokens behind a stage."""

    where: str
    kept: list[int]
    """Seats that are occupied, as token numbers."""
    owner: np.ndarray
    """(n,) int64: the seat that each token's content is in now, or ``DROPPED``."""

    def merged(self) -> np.ndarray:
        """Return (n,) bool: tokens that share their seat with others."""
        shared = np.bincount(self.owner[self.owner >= 0], minlength=len(self.owner)) > 1
        return (self.owner >= 0) & shared[np.maximum(self.owner, 0)]


def fates(run: Run, number: int = 0, tower: bool = False) -> list[Fate]:
    """Return what is left behind each stage of a run, of image ``number``; with ``tower``, first inside the tower.

    Without any stage there is one fate: every token in its own seat.
    """
    total = run.visual_tokens[number]
    owner = np.arange(total)
    steps = run.tower_steps if tower and _one_patch_a_token(run, number) else []
    found = []
    for layer, index, valid in steps:
        row = index[number] if valid is None else index[number][valid[number]]
        kept = row.tolist()
        found.append(Fate(f"tower layer {layer} on", kept, np.where(np.isin(owner, kept), owner, DROPPED)))
    for stage in run.stages:
        kept = np.asarray(stage.index[number], dtype=np.int64)
        if stage.merged_into is not None:
            into = np.asarray(stage.merged_into[number], dtype=np.int64)
            owner = np.where(into >= 0, kept[np.maximum(into, 0)], DROPPED) if len(kept) else np.full(total, DROPPED)
        else:
            owner = np.where(np.isin(owner, kept), owner, DROPPED)
        name = "all layers" if stage.where == "prompt" else f"{stage.where} on"
        found.append(Fate(name, kept.tolist(), owner))
    return found or [Fate("nothing dropped", owner.tolist(), owner)]


def _one_patch_a_token(run: Run, number: int) -> bool:
    """Return whether the tower's patches of image ``number`` are its tokens."""
    if not run.tower_steps:
        return False
    _, index, _ = run.tower_steps[0]
    return len(index) == len(run.visual_tokens) and run.tower_tokens[0] == run.visual_tokens[number]


def views(run: Run, adapter: Adapter, number: int = 0, ratio: float = 1.0) -> list[View]:
    """Return where the tokens of image ``number`` lie.

    Args:
        run: of the image.
        adapter: of the model.
        number: of the image in the run.
        ratio: the picture's width by its height, which tells how tiles lie that the model is not told of.
    """
    grids = _grids(run, adapter, number)
    if len(grids) > 1:
        span = run.spans[number] if len(run.spans) > number else None
        names = ["base view", "tiles"] if span is None else [f"frame {n}" for n in range(len(grids))]
        return [View(name, _places(grid)) for name, grid in zip(names, grids, strict=True)]
    (grid,) = grids
    tile, own = grid.height * grid.width, _places(grid)
    tiles = grid.start // tile
    if tiles < 1 or grid.start % tile:
        return [View("", own)]
    rows = _rows(tiles, ratio)
    blocks = [own - grid.start + n * tile for n in range(tiles)]
    across = tiles // rows
    return [
        View("whole image", own),
        View("tiles", np.block([blocks[row * across : (row + 1) * across] for row in range(rows)])),
    ]


def _grids(run: Run, adapter: Adapter, number: int) -> Sequence[Grid]:
    """Return the rectangles that the adapter knows.

    Without features (images that were encoded elsewhere) a tiled image's layout is unknown; the base view is certain.
    """
    if run.features is not None:
        span = run.spans[number] if len(run.spans) > number else None
        return adapter.grids(run.features[number], span) if span is not None else adapter.grids(run.features[number])
    assert adapter.patch_grid is not None
    rows, columns = adapter.patch_grid
    return [Grid(rows, columns, start=0, row_stride=columns)]


def _places(grid: Grid) -> np.ndarray:
    return grid.start + np.arange(grid.height)[:, None] * grid.row_stride + np.arange(grid.width)[None, :]


def _rows(tiles: int, ratio: float) -> int:
    """Return the number of rows of a full grid of square ``tiles`` whose shape is nearest to a picture's."""
    fitting = [rows for rows in range(1, tiles + 1) if tiles % rows == 0]
    return min(fitting, key=lambda rows: abs(np.log(tiles / rows / rows / ratio)))
