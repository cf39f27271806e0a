"""Which visual tokens were left of each picture, as JSON for a row: what a report draws over the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vislm.errors import PlanConflict

KeptTokens = dict[str, Any]
"""One picture: "of" (its visual tokens), "index" (those that were left, from 0 within the picture), "grid" (rows,
columns, first token, tokens from one row to the next; None where it is not known) and "seen" (left, top, right, bottom
of what the grid covers, as shares of the picture)."""


def kept_per_picture(lmm: Any, sizes: Sequence[tuple[int, int]]) -> list[KeptTokens | None] | None:
    """Return for each picture of the call that was just made what was left of it; None for one that lost nothing.

    Args:
        lmm: a ``vislm.LMM``.
        sizes: (width, height) of the pictures of the call, in order.

    Returns:
        None if the model recorded another number of pictures (it asked them one by one, or not at all).
    """
    run = getattr(lmm, "last_run", None)
    if run is None or len(run.visual_tokens) != len(sizes):
        return None
    index = run.stages[-1].index if run.stages else [range(count) for count in run.visual_tokens]
    return [
        None if len(index[n]) == run.visual_tokens[n] else _kept(lmm, run, n, [int(i) for i in index[n]], size)
        for n, size in enumerate(sizes)
    ]


def _kept(lmm: Any, run: Any, number: int, index: list[int], size: tuple[int, int]) -> KeptTokens:
    return {
        "of": run.visual_tokens[number],
        "index": index,
        "grid": _grid(lmm.adapter, run, number),
        "seen": [round(share, 4) for share in seen_share(size, lmm.adapter, getattr(lmm, "processor", None))],
    }


def _grid(adapter: Any, run: Any, number: int) -> list[int] | None:
    """Return the first rectangle of tokens, which shows the whole picture."""
    if run.features is None:
        return None if adapter.patch_grid is None else [*adapter.patch_grid, 0, adapter.patch_grid[1]]
    span = run.spans[number] if len(run.spans) > number else None
    try:
        first = adapter.grids(run.features[number], *([] if span is None else [span]))[0]
    except PlanConflict:
        return None
    return [first.height, first.width, first.start, first.row_stride]


def seen_share(size: tuple[int, int], adapter: Any, processor: Any) -> list[float]:
    """Return left, top, right and bottom of what the tower sees, as shares of a picture of that (width, height).

    A processor that crops the centre hides the ends of the long side; all others show the whole picture.
    """
    settings = getattr(processor, "image_processor", None)
    if settings is None or adapter.crops_per_image != 1 or not getattr(settings, "do_center_crop", False):
        return [0.0, 0.0, 1.0, 1.0]
    target, crop = dict(settings.size), dict(settings.crop_size)
    if "shortest_edge" in target:
        scale = target["shortest_edge"] / min(size)
        scaled = (size[0] * scale, size[1] * scale)
    else:
        scaled = (target["width"], target["height"])
    margins = [
        max(0.0, 0.5 - crop[side] / length / 2) for side, length in zip(("width", "height"), scaled, strict=True)
    ]
    return [margins[0], margins[1], 1 - margins[0], 1 - margins[1]]
