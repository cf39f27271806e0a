"""Sizes along axes, as typed on the command line."""

from __future__ import annotations

import re

from vislm.errors import UsageError


def parse_sizes(option: str, text: str, axes: int | None = None) -> tuple[int, ...]:
    """Return the numbers of a text such as ``56x56``; a single one is repeated over ``axes``.

    Raises:
        UsageError: no such text, or one with another number of axes; names the option.
    """
    if not re.fullmatch(r"\d+(x\d+)*", text.strip()):
        raise UsageError(f"{option} {text!r}, expected whole numbers joined by x, such as 56x56")
    sizes = tuple(int(size) for size in text.strip().split("x"))
    if axes is None or len(sizes) == axes:
        return sizes
    if len(sizes) > 1:
        raise UsageError(f"{option} {text} has {len(sizes)} axes, the grid has {axes}; give {axes} numbers, or one")
    return sizes * axes


def sizes_text(sizes: tuple[int, ...]) -> str:
    """Return sizes as typed: ``56x56``."""
    return "x".join(map(str, sizes))
