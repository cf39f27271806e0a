"""How much faster a local pattern can be than dense attention when the hardware works in tiles."""

from __future__ import annotations

from vislm.kernels.simulator.flattened import FlattenedCount, flattened_count
from vislm.kernels.simulator.model import Speedup, simulate
from vislm.kernels.simulator.suggest import Suggestion, suggest_windows
from vislm.kernels.simulator.tiles import AxisTiles, axis_tiles

__all__ = [
    "AxisTiles",
    "FlattenedCount",
    "Speedup",
    "Suggestion",
    "axis_tiles",
    "flattened_count",
    "simulate",
    "suggest_windows",
]
