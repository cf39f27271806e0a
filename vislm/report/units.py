"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def flops_text(count: float) -> str:
    """Return a FLOP count such as ``1.24 TFLOP``."""
    return f"{_scaled(count, 1000.0, ('', 'k', 'M', 'G', 'T', 'P'))}FLOP"


def bytes_text(count: float) -> str:
    """Return a size such as ``4.5 MiB``."""
    return f"{_scaled(count, 1024.0, ('', 'Ki', 'Mi', 'Gi', 'Ti'))}B"


def milliseconds_text(seconds: float) -> str:
    """Return a duration given in seconds, such as ``3.21 ms``."""
    return f"{three_digits(seconds * 1000.0)} ms"


def percent_text(share: float | None) -> str:
    """Return a share such as ``42 %``; a dash for None."""
    return "-" if share is None else f"{100.0 * share:.0f} %"


def three_digits(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    if value == 0:
        return "0"
    decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{decimals}f}"


def spans_text(values: Sequence[int], unit: str = "layer") -> str:
    """Return per-layer values with equal neighbours joined: ``75 in layers 0-1, 27 in layers 2-3``."""
    parts = []
    for value, group in groupby(enumerate(values), key=lambda pair: pair[1]):
        numbers = [number for number, _ in group]
        first, last = numbers[0], numbers[-1]
        place = f"{unit} {first}" if first == last else f"{unit}s {first}-{last}"
        parts.append(f"{value} in {place}")
    return ", ".join(parts)


def _scaled(count: float, base: float, prefixes: Sequence[str]) -> str:
    power = 0
    while abs(count) >= base and power < len(prefixes) - 1:
        count, power = count / base, power + 1
    return f"{three_digits(count) if power else f'{count:.0f}'} {prefixes[power]}"
