"""Which visual tokens are left, drawn over the picture they come from."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image

from vislm.errors import UsageError
from vislm.eval.running.kept_tokens import seen_share
from vislm.lmm.adapters import Adapter
from vislm.lmm.adapters.llava import Grid
from vislm.report.png import ACCENT

FADE = 0.82
"""How far a dropped patch is moved from its grey value towards white."""
TINT = 0.5
"""How far a merged patch is moved from its grey value towards its group's colour."""
_TARGET_SIDE = 384
"""Overlays are drawn with about this many pixels on the longer side."""


def seen_picture(image: Image.Image, adapter: Adapter, processor: Any | None = None) -> Image.Image:
    """Return the part of ``image`` that the vision tower sees, in the resolution of the original.

    A processor that scales the short side and crops the centre (LLaVA-1.5's CLIP processor) hides the ends of the long
    side; one that squashes the picture to a square (vislm-tiny's, and the base view of tiled models) hides nothing.
    Without a processor nothing is assumed to be hidden.
    """
    left, top, right, bottom = seen_share(image.size, adapter, processor)
    width, height = round((right - left) * image.width), round((bottom - top) * image.height)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def kept_map(grid: Grid, kept: Collection[int]) -> np.ndarray:
    """Return (rows, columns) bool: which patches of a grid are among the image's kept token indices."""
    token = grid.start + np.arange(grid.height)[:, None] * grid.row_stride + np.arange(grid.width)[None, :]
    return np.isin(token, np.fromiter(kept, dtype=np.int64, count=len(kept)))


def kept_overlay(image: Image.Image, grid: Grid, kept: Collection[int]) -> Image.Image:
    """Return the picture with dropped patches faded and kept ones clear inside a thin outline.

    Every patch gets the same whole number of pixels, at least 6, so the picture's shape becomes that of the grid when
    the two differ (the tower sees it like that).

    Args:
        image: what the grid covers (see :func:`seen_picture`).
        grid: where the tokens lie, from ``adapter.grids(features)``.
        kept: indices into the image's full token sequence; those outside this grid are ignored.

    Raises:
        UsageError: a grid without patches, or a negative index.
    """
    if grid.height < 1 or grid.width < 1:
        raise UsageError(f"a grid of {grid.height} x {grid.width} patches has nothing to draw")
    if any(index < 0 for index in kept):
        raise UsageError(f"token index {min(kept)} is negative; indices count from 0 within the image")
    alive = kept_map(grid, kept)
    return patch_overlay(image, alive, np.full(alive.shape, -1))


def patch_overlay(image: Image.Image, alive: np.ndarray, group: np.ndarray) -> Image.Image:
    """Return the picture with dropped patches faded, patches that were merged tinted, and the other ones clear.

    Args:
        image: what the patches cover.
        alive: (rows, columns) bool, False on dropped patches.
        group: (rows, columns) int64; merged patches with the same number get the same colour, -1 is not tinted.
    """
    rows, columns = alive.shape
    cell = max(6, round(_TARGET_SIDE / max(rows, columns)))
    size = (columns * cell, rows * cell)
    enlarged = min(size[0] / image.width, size[1] / image.height) >= 2.0
    clear = image.convert("RGB").resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
    pixels = np.asarray(clear, dtype=np.float32)
    grey = np.asarray(clear.convert("L"), dtype=np.float32)[..., None]
    faded = (grey + FADE * (255.0 - grey)).round()
    tinted = np.where((group >= 0)[..., None], colours(group), 0.0).repeat(cell, 0).repeat(cell, 1)
    in_group = (group >= 0).repeat(cell, 0).repeat(cell, 1)[..., None]
    coloured = (grey + TINT * (tinted - grey)).round()
    alive = alive.repeat(cell, 0).repeat(cell, 1)
    drawn = np.where(in_group, coloured, pixels)
    drawn = np.where(alive[..., None], drawn, faded).astype(np.uint8)
    drawn[_outline(alive, thickness=max(1, cell // 24))] = _rgb(ACCENT)
    return Image.fromarray(drawn)


def colours(group: np.ndarray) -> np.ndarray:
    """Return (..., 3) float32 colours 0..255 of whole numbers; neighbouring numbers get hues far apart."""
    hue = (np.maximum(group, 0) * 0.618034) % 1.0
    light = np.where(np.maximum(group, 0) % 2 == 0, 0.95, 0.7)
    phase = (hue[..., None] * 6.0 + np.array([5.0, 3.0, 1.0])) % 6.0
    pure = 1.0 - 0.85 * np.clip(np.minimum(phase, 4.0 - phase), 0.0, 1.0)
    return (255.0 * light[..., None] * pure).astype(np.float32)


def _outline(alive: np.ndarray, thickness: int) -> np.ndarray:
    """Return (height, width) bool: dropped pixels within ``thickness`` of a kept one; kept pixels stay untouched."""
    near = alive.copy()
    for _ in range(thickness):
        grown = near.copy()
        grown[1:] |= near[:-1]
        grown[:-1] |= near[1:]
        grown[:, 1:] |= near[:, :-1]
        grown[:, :-1] |= near[:, 1:]
        near = grown
    return near & ~alive


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
