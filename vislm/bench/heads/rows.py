"""Figures of one method against the untouched model, and whether they are within the limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from vislm.bench.heads.measure import WARM_STEPS, Group, Measured
from vislm.report.tables import Cell

STEP_LIMITS = {"vhr": 1.02, "var": 1.10, "pai": 1.10, "spin": 1.10}
"""Most that a decode step may take, over the untouched model's."""
TEXT_ONLY_LIMITS = {"vhr": 1.0}
"""Most that a method may add to the prefill, in prefills of the text alone."""


def step_seconds(measured: Measured) -> float:
    """Return the median time of a decode step, the first ones left out."""
    return median(measured.steps[WARM_STEPS:] or measured.steps)


def _ratio(ours: Sequence[Measured], base: Sequence[Measured], figure: Callable[[Measured], float]) -> float:
    return median(figure(one) / figure(other) for one, other in zip(ours, base, strict=True))


@dataclass(frozen=True)
class Row:
    """What was measured: medians over the rounds, ratios within each round before."""

    method: str
    generate: str
    """How the model decodes, here and untouched."""
    rounds: int
    tower: float
    """Time of the vision tower over that of the untouched model."""
    prefill_seconds: float
    prefill: float
    """Over that of the untouched model."""
    text_prefills: float
    """What is added to the prefill, in prefills of the text alone."""
    step_seconds: float
    step: float
    """Over that of the untouched model."""
    extra_bytes: int | None
    """By how much the peak of memory is higher."""

    @classmethod
    def of(cls, name: str, group: Group) -> Row:
        """Put together the rounds of a case and those of the untouched model beside them."""
        ours = group.rounds[name]
        base, text = group.untouched[: len(ours)], group.text_only[: len(ours)]
        peak = group.peaks[name]
        added = zip(ours, base, text, strict=True)
        return cls(
            method=name,
            generate=", ".join(f"{key}={value}" for key, value in group.options.items()),
            rounds=len(ours),
            tower=_ratio(ours, base, lambda m: m.tower),
            prefill_seconds=median(m.prefill for m in ours),
            prefill=_ratio(ours, base, lambda m: m.prefill),
            text_prefills=median((one.prefill - other.prefill) / alone for one, other, alone in added),
            step_seconds=median(step_seconds(m) for m in ours),
            step=_ratio(ours, base, step_seconds),
            extra_bytes=None if peak is None or group.peak is None else peak - group.peak,
        )

    def misses(self) -> list[str] | None:
        """Return what is beyond the limits; None for a method that has none."""
        if self.method not in STEP_LIMITS:
            return None
        found = []
        if self.step > STEP_LIMITS[self.method]:
            found.append(f"a decode step takes {self.step:.3f} (limit {STEP_LIMITS[self.method]:.2f})")
        most = TEXT_ONLY_LIMITS.get(self.method)
        if most is not None and self.text_prefills > most:
            found.append(f"the prefill takes {self.text_prefills:.2f} prefills of the text more (limit {most:.0f})")
        return found

    def cells(self) -> dict[str, Cell]:
        """Return the row of the printed table."""
        return {
            "method": self.method,
            "decoding": self.generate or "greedy",
            "prefill ms": f"{self.prefill_seconds * 1e3:.0f}",
            "of untouched": f"{self.prefill:.3f}",
            "text prefills more": f"{self.text_prefills:+.2f}",
            "tower": f"{self.tower:.3f}",
            "step ms": f"{self.step_seconds * 1e3:.1f}",
            "of untouched step": f"{self.step:.3f}",
            "peak MiB more": "-" if self.extra_bytes is None else f"{self.extra_bytes / 2**20:+.1f}",
        }
