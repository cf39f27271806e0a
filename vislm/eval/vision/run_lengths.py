"""COCO's run lengths of masks, checked before a scorer written in C reads them."""

from __future__ import annotations

from typing import Any

import numpy as np

from vislm.eval.reading import shown

_FIRST, _LAST = 48, 111
"""A packed character holds 6 bits: 5 of the number, and whether more follow."""
_LONGEST = 7
"""Characters of a number: 35 bits."""


def mask_fault(mask: Any, width: int, height: int) -> str | None:
    """Return what is wrong with run lengths {"size": [height, width], "counts": packed text or numbers}, or None."""
    size, counts = (mask.get("size"), mask.get("counts")) if isinstance(mask, dict) else (None, None)
    if size != [height, width]:
        return f"has size {shown(size)}; expected {[height, width]} (height, width)"
    runs = unpack(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(v) is int and 0 <= v <= width * height for v in runs):
        return f"has counts {shown(counts)}; expected run lengths"
    if sum(runs) != width * height:
        return f"counts {sum(runs)} pixels; the picture has {width * height}"
    return None


def unpack(text: str) -> list[int] | None:
    """Return the run lengths of COCO's packed form, None if the text is none.

    Numbers are written in pieces of 5 bits, the lowest first, the last with its sign; from the fourth on they are
    differences to the last but one.
    """
    codes = np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int64)
    if not codes.size:
        return None
    if codes.min() < _FIRST or codes.max() > _LAST or (codes[-1] - _FIRST) & 32:
        return None
    codes -= _FIRST
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST:
        return None
    shift = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 31) << shift, starts)
    values -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    runs: list[int] = []
    for place, value in enumerate(values.tolist()):
        runs.append(value + runs[place - 2] if place > 2 else value)
    return runs
