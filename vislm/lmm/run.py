"""What one call of the model did: tokens kept, head factors, sizes, times."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vislm.lmm.interventions import Kept


@dataclass
class Run:
    """The record of one prefill and its decode steps; ``session.last_run`` or ``lmm.last_run``."""

    memory: dict[int, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    """State of every intervention, by its place in the session."""
    batch: int = 0
    prompt_tokens: int = 0
    """Columns of the caller's prompt (padding included)."""
    visual_tokens: list[int] = field(default_factory=list)
    """Visual tokens of every image in the full prompt."""
    stages: list[Kept] = field(default_factory=list)
    """Which visual tokens were left after each stage."""
    tower_tokens: list[int] = field(default_factory=list)
    """Patch tokens at the input of each vision layer; empty when the tower ran untouched."""
    layer_tokens: list[int] = field(default_factory=list)
    """Columns that each decoder layer processed in the prefill = keys it cached."""
    kv_bytes: int = 0
    """Measured size of the key-value cache after the last forward."""
    new_tokens: int = 0
    """Decode steps."""
    head_factors: dict[int, Tensor] = field(default_factory=dict)
    """Decoder layer -> (B, H) factors."""
    seconds: dict[str, float] = field(default_factory=lambda: {"tower": 0.0, "prefill": 0.0, "decode": 0.0})
    """Wall time of each phase; prefill excludes the tower."""
    flops: dict[str, int] = field(default_factory=dict)
    """FLOPs of the cost model: "tower", "prefill" (a text-only stream included), and the same of the untouched model as
    "full_tower", "full_prefill"."""
    features: list[Tensor] | None = field(default=None, repr=False)

    def keep_stage(self, kept: Kept) -> None:
        """Append a stage's verdict."""
        self.stages.append(kept)

    @property
    def visual_tokens_kept(self) -> list[int]:
        """Visual tokens of every image that were left at the end of the prefill."""
        return [len(kept) for kept in self.stages[-1].index] if self.stages else list(self.visual_tokens)

    def realised_saving(self, full: Run) -> float | None:
        """Return (1 - t / t0) / (1 - F / F0) against a run without pruning: the share of the theoretical saving.

        t and F are seconds and FLOPs of tower and prefill together; None when the plan saves no FLOPs.
        """
        saved = 1.0 - sum(self._cost("flops", self)) / sum(self._cost("flops", full))
        if saved <= 0.0:
            return None
        return (1.0 - sum(self._cost("seconds", self)) / sum(self._cost("seconds", full))) / saved

    @staticmethod
    def _cost(kind: str, run: Run) -> tuple[float, float]:
        figures = getattr(run, kind)
        return figures["tower"], figures["prefill"]


def clock(device: torch.device) -> float:
    """Return seconds, after the device's queue has drained."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
