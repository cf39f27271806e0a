"""Attention patterns: which query sees which key. A new pattern is one new file here and one line in this one."""

from __future__ import annotations

from vislm.kernels.patterns.base import Pattern
from vislm.kernels.patterns.blocked import Blocked
from vislm.kernels.patterns.grid import GridPattern
from vislm.kernels.patterns.neighborhood import Neighborhood
from vislm.kernels.patterns.sequence import Causal, Dense, Masked, Padded
from vislm.kernels.patterns.window import Window

PATTERNS = (Dense, Causal, Padded, Masked, Neighborhood, Blocked, Window)

__all__ = [
    "PATTERNS",
    "Blocked",
    "Causal",
    "Dense",
    "GridPattern",
    "Masked",
    "Neighborhood",
    "Padded",
    "Pattern",
    "Window",
]
