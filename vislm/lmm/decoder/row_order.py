"""Letting what belongs to the rows of a cache follow them when a beam search reorders them."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vislm.lmm.interventions import EditStage
from vislm.lmm.state import SessionState


def follow_rows(cache: Any, follower: Callable[[Tensor], None]) -> None:
    """Call ``follower`` with the new order (B,) whenever this cache is reordered, and no copy of it."""
    own, before = weakref.ref(cache), cache.__dict__.get("reorder_cache")
    reorder = type(cache).reorder_cache if before is None else before.__func__

    def reorder_both(cache: Any, beam_idx: Tensor) -> None:
        reorder(cache, beam_idx)
        if cache is own():
            follower(beam_idx)

    cache.reorder_cache = types.MethodType(reorder_both, cache)


def leave_rows(cache: Any) -> None:
    """Take all followers off a cache, if it still is there."""
    if cache is not None:
        cache.__dict__.pop("reorder_cache", None)


class MemoryRows:
    """Reorders what stages remember of every row (``EditStage.by_row``)."""

    def __init__(self, shared: SessionState, stages: list[tuple[int, EditStage]]) -> None:
        self.shared = shared
        self.names = [(owner, name) for owner, stage in stages for name in stage.by_row]
        self._cache: weakref.ref[Any] | None = None

    def follow(self, cache: Any) -> None:
        """Follow the cache that a prefill has filled."""
        if self.names and cache is not None:
            follow_rows(cache, self._reorder)
            self._cache = weakref.ref(cache)

    def stop(self) -> None:
        """Let go of the cache."""
        leave_rows(None if self._cache is None else self._cache())
        self._cache = None

    def _reorder(self, rows: Tensor) -> None:
        for owner, name in self.names:
            memory = self.shared.run.memory[owner]
            memory[name] = {layer: values[rows] for layer, values in memory[name].items()}
