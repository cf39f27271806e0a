"""Pictures and one interactive page of an analysis of attention (``vislm.analysis``)."""

from __future__ import annotations
