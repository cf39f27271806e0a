"""Attention patterns: which query sees which key. A new pattern is one new file here and one line in this one."""

from __future__ import annotations

from vislm.kernels.patterns.base import Pattern
from vislm.kernels.patterns.sequence import Causal, Dense, Masked, Padded

PATTERNS = (Dense, Causal, Padded, Masked)

__all__ = ["PATTERNS", "Causal", "Dense", "Masked", "Padded", "Pattern"]
