"""The measured figures of a pair of models at one size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vislm.bench.backbones.calls import model_call
from vislm.bench.backbones.models import Model, Pair
from vislm.bench.kernels.timing import interleaved
from vislm.report.units import bytes_text, three_digits

REFERENCE_SIZE = 224
"""Pixels along a side at which a batch has as many images as wished; larger images come in smaller batches."""


@dataclass(frozen=True)
class Figures:
    """What one model took at one size.

    Attributes:
        seconds: fastest round with one image.
        median: median round with one image.
        images_per_second: in batches of :func:`batch_at`, fastest round.
        peak: bytes at most in use beside weights and image, one image; None where it is not known.
    """

    seconds: float
    median: float
    images_per_second: float
    peak: int | None = None


@dataclass(frozen=True)
class Row:
    """Ours and the peer at one size of square images."""

    pair: Pair
    size: int
    batch: int
    ours: Figures
    peer: Figures

    @property
    def time_ratio(self) -> float:
        """Our time for one image over the peer's; below 1, ours is faster."""
        return self.ours.seconds / self.peer.seconds

    @property
    def throughput_ratio(self) -> float:
        """Our images per second over the peer's."""
        return self.ours.images_per_second / self.peer.images_per_second

    @property
    def memory_ratio(self) -> float | None:
        """Our peak over the peer's."""
        return None if self.ours.peak is None or not self.peer.peak else self.ours.peak / self.peer.peak


def batch_at(size: int, batch: int) -> int:
    """Return how many images of ``size`` make about as many pixels as ``batch`` of 224, at least 1."""
    return max(1, batch * REFERENCE_SIZE**2 // size**2)


def measure(
    pairs: Sequence[Pair], wanted: int, batch: int, repeats: int, budget: float, training: bool
) -> Iterator[Row]:
    """Yield the rows, without peaks, of the pairs that share a peer; all their models take turns.

    Args:
        pairs: all with the same peer.
        wanted: pixels along a side.
        batch: images at 224 pixels; see :func:`batch_at`.
        repeats: rounds at most.
        budget: seconds after which no further round starts.
        training: forward and backward, and not inference.
    """
    size = pairs[0].size(wanted)
    models = list(dict.fromkeys(model for pair in pairs for model in (pair.ours, pair.peer)))
    built = {model: model.build(size) for model in models}
    images = batch_at(size, batch)

    def seconds(images: int) -> dict[str, list[float]]:
        calls = {m.key: model_call(built[m], (images, 3, size, size), training) for m in models}
        return interleaved(calls, repeats, budget)

    single = seconds(1)
    many = single if images == 1 else seconds(images)

    def figures(model: Model) -> Figures:
        one, batch = single[model.key], many[model.key]
        return Figures(min(one), statistics.median(one), images / min(batch))

    for pair in pairs:
        yield Row(pair, size, images, figures(pair.ours), figures(pair.peer))


def growth(points: Sequence[tuple[int, float]]) -> float | None:
    """Return the slope of the log of the time over the log of the pixels, 1 = linear; None for a single size.

    Args:
        points: side of the image, seconds.
    """
    if len({size for size, _ in points}) < 2:
        return None
    pixels, seconds = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    return statistics.linear_regression([2 * pixel for pixel in pixels], seconds).slope


def table_row(row: Row) -> dict[str, str]:
    """Return a row of the printed table."""
    return {
        "ours": row.pair.ours.name,
        "timm's": row.pair.peer.short_name,
        "pixels": str(row.size),
        "ms": three_digits(row.ours.seconds * 1e3),
        "timm's ms": three_digits(row.peer.seconds * 1e3),
        "time x": f"{row.time_ratio:.2f}",
        "batch": str(row.batch),
        "img/s": three_digits(row.ours.images_per_second),
        "timm's img/s": three_digits(row.peer.images_per_second),
        "img/s x": f"{row.throughput_ratio:.2f}",
        "peak": _bytes(row.ours.peak),
        "timm's peak": _bytes(row.peer.peak),
        "memory x": "-" if row.memory_ratio is None else f"{row.memory_ratio:.2f}",
    }


def _bytes(count: int | None) -> str:
    return "-" if count is None else bytes_text(count)
