"""Layer ranges that were published for one depth, on models of another."""

from __future__ import annotations

from collections.abc import Sequence


def scaled_layers(depth: int, first: int, stop: int, published: int = 32) -> frozenset[int]:
    """Return the decoder layers [first, stop) of a model with ``published`` layers, scaled to ``depth`` layers.

    Both ends are multiplied by depth / published and rounded; at least one layer is left.
    """
    start = min(round(first * depth / published), depth - 1)
    return frozenset(range(start, max(start + 1, round(stop * depth / published))))


def chosen_layers(layers: Sequence[int] | None, depth: int, first: int, stop: int) -> frozenset[int]:
    """Return the layers that an option names, or the published range [first, stop) of 32 if it names none."""
    return scaled_layers(depth, first, stop) if layers is None else frozenset(layers)
