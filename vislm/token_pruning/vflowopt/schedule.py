"""VFlowOpt's three retention ratios and their average over the decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vislm.errors import PlanConflict, UsageError


class Retention(NamedTuple):
    """The share of the tokens alive that each stage keeps."""

    r1: float
    r2: float
    r3: float

    def average(self, lengths: Sequence[int]) -> float:
        """Return Rbar = (R1 L1 + R1 R2 L2 + R1 R2 R3 L3) / L for stages of ``lengths`` = (L1, L2, L3) layers."""
        r1, r2, r3 = self
        return (r1 * lengths[0] + r1 * r2 * lengths[1] + r1 * r2 * r3 * lengths[2]) / sum(lengths)


def solve_retention(
    average: float, lengths: Sequence[int], r1: float | None = None, r2: float | None = None, r3: float | None = None
) -> Retention:
    """Return R1, R2, R3 with a given average; what is not None stays.

    R1 = 1.25 Rbar and R2 = Rbar / R1 unless given (both in the middle of what the paper searches), and R3 makes up the
    rest, at most 1.

    Raises:
        UsageError: R1 and R2 alone exceed the average, so that R3 would have to be 0 or less.
    """
    r1 = min(1.0, 1.25 * average) if r1 is None else r1
    r2 = min(1.0, average / r1) if r2 is None else r2
    if r3 is None:
        first, second, third = lengths
        r3 = min(1.0, (average * sum(lengths) - r1 * first - r1 * r2 * second) / (third * r1 * r2))
    if r3 <= 0.0:
        raise UsageError(
            f"vflowopt: R1={r1:g} and R2={r2:g} keep more than an average of {average:.4g} already, R3 would be "
            f"{r3:.3g}; lower R1 or R2, or raise keep"
        )
    return Retention(r1, r2, r3)


def stage_lengths(layers: Sequence[int] | None, depth: int) -> tuple[int, int, int]:
    """Return L1, L2, L3: decoder layers that run with the tokens of each stage.

    Args:
        layers: (k2, k3) before which stages 2 and 3 act; None: the first and second third.
        depth: L.

    Raises:
        PlanConflict: layers that the model does not have.
    """
    chosen = (depth // 3, 2 * (depth // 3)) if layers is None else tuple(layers)
    if len(chosen) != 2 or not 0 <= chosen[0] < chosen[1] < depth:
        raise PlanConflict(f"vflowopt: layers={chosen}; expected two of 0..{depth - 1}, ascending")
    return chosen[0], chosen[1] - chosen[0], depth - chosen[1]
