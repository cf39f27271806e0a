"""How many tokens each layer merges."""

from __future__ import annotations

from itertools import pairwise

from vislm.errors import UsageError


def check_schedule(r: object) -> None:
    """Raise ``UsageError`` unless r is a number of tokens, ``(r, inflection)`` or a list of numbers of tokens."""
    if isinstance(r, tuple) and len(r) == 2 and _is_count(r[0]) and isinstance(r[1], (int, float)):
        return
    counts = r if isinstance(r, list) else [r]
    if not all(_is_count(count) for count in counts):
        raise UsageError(
            f"{r=}: expected tokens to merge per layer such as 13, (13, -1.0) for a number that changes linearly from "
            "layer to layer (-1: from 26 to 0), or a list with one number per layer"
        )


def merge_schedule(r: int | tuple[int, float] | list[int], layers: int) -> list[int]:
    """Return how many tokens each of ``layers`` layers is asked to merge.

    Args:
        r: the same number in every layer; or ``(r, inflection)``, linear from ``int(r (1 - inflection))`` with mean r,
            rounded down (an inflection of -1 decreases to 0, +1 increases from 0); or a list, continued by zeros.
        layers: number of layers.

    Raises:
        UsageError: anything else, or a list that is longer than the layers.
    """
    check_schedule(r)
    if isinstance(r, list):
        if len(r) > layers:
            raise UsageError(f"r has {len(r)} numbers, expected at most one for each of {layers} layers")
        return r + [0] * (layers - len(r))
    mean, inflection = r if isinstance(r, tuple) else (r, 0.0)
    start = int(mean * (1.0 - inflection))
    step = (2 * mean - 2 * start) / max(1, layers - 1)
    return [int(start + step * layer) for layer in range(layers)]


def schedule_to_keep(keep: int, tokens: int, layers: int) -> list[int]:
    """Return the schedule that leaves exactly ``keep`` of ``tokens`` tokens, protected ones not counted.

    It merges the smallest constant number that gets there, and in the layer that arrives only what is left to do.

    Raises:
        UsageError: so few cannot be reached, as a layer merges at most half of its tokens.
    """
    least = sizes_behind([tokens] * layers, tokens)[-1]
    if keep < least:
        raise UsageError(f"{keep=}: merging in {layers} layers leaves at least {least} of {tokens} tokens")
    constant = next(r for r in range(tokens + 1) if sizes_behind([r] * layers, tokens)[-1] <= keep)
    counts = [max(keep, count) for count in sizes_behind([constant] * layers, tokens)]
    return [before - behind for before, behind in pairwise(counts)]


def sizes_behind(schedule: list[int], tokens: int) -> list[int]:
    """Return the tokens that enter the first layer and those that each layer leaves, protected ones not counted."""
    counts = [tokens]
    for r in schedule:
        counts.append(counts[-1] - min(max(0, r), counts[-1] // 2))
    return counts


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
