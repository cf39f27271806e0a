"""One attention operator, its patterns, its statistics and its backends."""

from __future__ import annotations

from vislm.kernels.backends import BACKENDS, Explanation
from vislm.kernels.bias import AxialBias, Bias, DecoupledBias, HeadwiseBias, LowRankBias, RelativeBias
from vislm.kernels.merging import merge
from vislm.kernels.normalization import Sigmoid
from vislm.kernels.operator import Attended, attend, attention_statistics, explain
from vislm.kernels.patterns import (
    Blocked,
    Causal,
    Dense,
    GridPattern,
    Masked,
    Neighborhood,
    Padded,
    Pattern,
    Window,
)
from vislm.kernels.shapes import Shape
from vislm.kernels.statistics import Statistics, StatisticsRequest
from vislm.kernels.tokens import Merged, gather_tokens, merge_tokens, scatter_tokens

__all__ = [
    "BACKENDS",
    "Attended",
    "AxialBias",
    "Bias",
    "Blocked",
    "Causal",
    "DecoupledBias",
    "Dense",
    "Explanation",
    "GridPattern",
    "HeadwiseBias",
    "LowRankBias",
    "Masked",
    "Merged",
    "Neighborhood",
    "Padded",
    "Pattern",
    "RelativeBias",
    "Shape",
    "Sigmoid",
    "Statistics",
    "StatisticsRequest",
    "Window",
    "attend",
    "attention_statistics",
    "explain",
    "gather_tokens",
    "merge",
    "merge_tokens",
    "scatter_tokens",
]
