"""One attention operator, its patterns, its statistics and its backends."""

from __future__ import annotations

from vislm.kernels.backends import BACKENDS, Explanation
from vislm.kernels.merging import merge
from vislm.kernels.operator import Attended, attend, attention_statistics, explain
from vislm.kernels.patterns import Causal, Dense, Masked, Padded, Pattern
from vislm.kernels.shapes import Shape
from vislm.kernels.statistics import Statistics, StatisticsRequest

__all__ = [
    "BACKENDS",
    "Attended",
    "Causal",
    "Dense",
    "Explanation",
    "Masked",
    "Padded",
    "Pattern",
    "Shape",
    "Statistics",
    "StatisticsRequest",
    "attend",
    "attention_statistics",
    "explain",
    "merge",
]
