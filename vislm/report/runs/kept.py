"""Dropped visual tokens as a veil to lay over a thumbnail."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

_VEIL, _UNSEEN = 205, 235
"""Opacity of dropped patches, and of what the model does not see at all."""
_MOST_CELLS = 1 << 16


def veil(kept: Any, size: tuple[int, int]) -> Image.Image | None:
    """Return a picture of (width, height) ``size``, clear where a token is left and whitish elsewhere.

    Args:
        kept: one picture's entry of a row's "kept" (``vislm.eval.running.kept_tokens``).
        size: of the thumbnail.

    Returns:
        None where the entry does not say where its tokens lie, or is damaged.
    """
    cells, box = _cells(kept), _box(kept, size)
    if cells is None or box is None:
        return None
    veiled = Image.new("L", size, _UNSEEN)
    alpha = np.where(cells, 0, _VEIL).astype(np.uint8)
    left, top, right, bottom = box
    veiled.paste(Image.fromarray(alpha).resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    return Image.merge("LA", (Image.new("L", size, 255), veiled))


def kept_text(kept: Any) -> str:
    """Return ``16 of 64 tokens``; nothing for a damaged entry."""
    if not isinstance(kept, dict) or type(kept.get("of")) is not int or not isinstance(kept.get("index"), list):
        return ""
    return f"{len(kept['index'])} of {kept['of']} tokens"


def _cells(kept: Any) -> np.ndarray | None:
    """Return (rows, columns) bool: which patches are left."""
    if not isinstance(kept, dict) or not _are_whole(kept.get("grid")) or not _are_whole(kept.get("index")):
        return None
    if len(kept["grid"]) != 4:
        return None
    rows, columns, start, stride = kept["grid"]
    if rows < 1 or columns < 1 or rows * columns > _MOST_CELLS:
        return None
    token = start + np.arange(rows)[:, None] * stride + np.arange(columns)[None, :]
    return np.isin(token, np.asarray(kept["index"], dtype=np.int64))


def _are_whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 31 for v in values)


def _box(kept: Any, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Return left, top, right, bottom in pixels of what the grid covers."""
    shares = kept.get("seen", [0.0, 0.0, 1.0, 1.0]) if isinstance(kept, dict) else None
    if not isinstance(shares, list) or len(shares) != 4:
        return None
    if not all(type(v) in (int, float) and 0.0 <= v <= 1.0 for v in shares):
        return None
    left, top, right, bottom = (round(v * size[n % 2]) for n, v in enumerate(shares))
    return (left, top, right, bottom) if left < right and top < bottom else None
