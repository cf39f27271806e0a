"""What the figures say about the claims that backbones with efficient attention are built on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vislm.bench.backbones.blocks import BlockRow
from vislm.bench.backbones.models import DEIT_S, growth_is_linear
from vislm.bench.backbones.rows import Row, growth

LINEAR = 1.1
"""Largest exponent of time over pixels that counts as linear."""
SLACK = 1.05
"""Ratio of times up to which two count as equal: what repeated runs differ by."""
LARGE = 896
"""Pixels along a side at which DeiT-S has to be beaten."""


@dataclass(frozen=True)
class Verdict:
    """A claim about one model, whether it holds, and the figures that say so."""

    claim: str
    about: str
    holds: bool
    figures: str


def growths(rows: Sequence[Row]) -> dict[str, float]:
    """Return the key of each model -> exponent of its time over the pixels, between the two largest sizes."""
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        for model, figures in ((row.pair.ours, row.ours), (row.pair.peer, row.peer)):
            seen = points.setdefault(model.key, {})
            seen[row.size] = min(figures.seconds, seen.get(row.size, figures.seconds))
    found = {key: growth(sorted(seen.items())[-2:]) for key, seen in points.items()}
    return {key: slope for key, slope in found.items() if slope is not None}


def verdicts(rows: Sequence[Row], blocks: Sequence[BlockRow]) -> list[Verdict]:
    """Return the verdicts that the figures allow: linear growth, DeiT-S beaten at 896 pixels, Swin's block matched."""
    return [*_linear(rows), *_beats_deit(rows), *_block(blocks)]


def _linear(rows: Sequence[Row]) -> Iterator[Verdict]:
    ours = {row.pair.ours.key: row.pair.ours.name for row in rows}
    for key, slope in growths(rows).items():
        if key in ours and growth_is_linear(ours[key]):
            text = f"time ~ pixels ^ {slope:.2f} (at most {LINEAR})"
            yield Verdict("time grows linearly with the pixels", ours[key], slope <= LINEAR, text)


def _beats_deit(rows: Sequence[Row]) -> Iterator[Verdict]:
    for row in rows:
        if row.pair.peer.name == DEIT_S and row.size >= LARGE:
            memory = row.memory_ratio
            text = f"time x {row.time_ratio:.2f}, memory x {'-' if memory is None else f'{memory:.2f}'}"
            holds = row.time_ratio < 1 and (memory is None or memory < 1)
            yield Verdict(f"beats DeiT-S at {row.size} pixels in time and memory", row.pair.ours.name, holds, text)


def _block(blocks: Sequence[BlockRow]) -> Iterator[Verdict]:
    for training, label in ((False, "forward"), (True, "forward + backward")):
        ratios = [row.ratio for row in blocks if row.training is training]
        if ratios:
            total = sum(row.ours for row in blocks if row.training is training)
            total /= sum(row.peer for row in blocks if row.training is training)
            text = f"all stages together x {total:.2f}, single ones {min(ratios):.2f} to {max(ratios):.2f}"
            yield Verdict(
                "block not slower than timm's Swin block", f"neighborhood, {label}", max(ratios) <= SLACK, text
            )
