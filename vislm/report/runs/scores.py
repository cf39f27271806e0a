"""What is computed once for the tables and plots of a bundle: intervals, standard errors, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vislm.eval.compare import Comparison, compare, figure_interval
from vislm.eval.uncertainty import Interval
from vislm.report.runs.bundle import Bundle

_FOR_ERRORS = 200
"""Draws for the standard errors of AUROCs; all others have a closed form."""


@dataclass(frozen=True)
class Scores:
    """Numbers of runs on the same samples."""

    own: Sequence[Sequence[Comparison]]
    """Per run its figures part by part, with standard errors (the run beside itself)."""
    intervals: Sequence[Mapping[str, Interval]]
    """Per run figure -> 95 % interval over all parts."""
    differences: Sequence[tuple[int, Sequence[Comparison]]]
    """For each other run its number and its paired differences: the first run minus it."""


def measure(bundle: Bundle, resamples: int) -> Scores:
    """Compute all numbers; ``resamples`` draws of the bootstrap over pictures per interval and difference."""
    first, *others = bundle.runs
    intervals = [
        {f.name: i for f in run.figures if (i := figure_interval(run, f, resamples=resamples)) is not None}
        for run in bundle.runs
    ]
    return Scores(
        [compare(run, run, resamples=min(_FOR_ERRORS, resamples)) for run in bundle.runs],
        intervals,
        [(n, compare(first, run, resamples=resamples)) for n, run in enumerate(others, start=1)],
    )
