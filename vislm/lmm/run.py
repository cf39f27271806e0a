"""What one call of the model did: tokens kept, head factors, sizes, times."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vislm.lmm.interventions import Kept

PHASES = ("tower", "prompt", "prefill", "decode", "scoring")


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
    tower_steps: list[tuple[int, Tensor, Tensor | None]] = field(default_factory=list, repr=False)
    """(layer, index, valid): from vision layer ``layer`` on the patches index (B, n) of B images or crops were left,
    where valid (B, n) is not False; empty for towers that pack their images, or merge."""
    layer_tokens: list[int] = field(default_factory=list)
    """Columns that each decoder layer processed in the prefill = keys it cached."""
    kv_bytes: int = 0
    """Measured size of the key-value cache after the last forward."""
    kv_bytes_expected: int = 0
    """The cost model's count of the same."""
    contrast_kv_bytes: int = 0
    """Measured size of the contrast stream's cache; 0 without one."""
    peak_bytes: int | None = None
    """By how much memory grew at most during the call; None unless ``vislm.lmm.cost.measuring`` made the call."""
    new_tokens: int = 0
    """Decode steps."""
    head_factors: dict[int, Tensor] = field(default_factory=dict)
    """Decoder layer -> (B, H) factors."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    """Wall time of each phase: "tower" (projector and packing included), "prompt" (choosing and removing tokens before
    the language model), "prefill", "decode". "scoring" is part of the others: what methods took to score and choose;
    0 on devices that work in the background, where stopping it would slow them down. A contrast stream adds
    "contrast_prefill" (encoding its images included) and "contrast_decode"."""
    flops: dict[str, int] = field(default_factory=dict)
    """FLOPs of the cost model: "tower", "prefill" (a text-only stream included), and the same of the untouched model as
    "full_tower", "full_prefill". A contrast stream adds "contrast_prefill" (tower included) and "contrast_decode"."""
    features: list[Tensor] | None = field(default=None, repr=False)
    """(n, C) visual tokens of every image in the full prompt."""
    spans: list[tuple[int, int, int] | None] = field(default_factory=list)
    """Token grid (frames, rows, columns) of every image, for ``adapter.grids``; None where the features tell it."""

    def keep_stage(self, kept: Kept) -> None:
        """Append a stage's verdict."""
        self.stages.append(kept)

    @property
    def visual_tokens_kept(self) -> list[int]:
        """Visual tokens of every image that were left at the end of the prefill."""
        return [len(kept) for kept in self.stages[-1].index] if self.stages else list(self.visual_tokens)

    def realised_saving(self, full: Run, phases: Sequence[str] = ("tower", "prefill")) -> float | None:
        """Return (1 - t / t0) / (1 - F / F0) against a run without pruning: the share of the theoretical saving.

        Args:
            full: the same prompt without pruning.
            phases: what t and F add up, by default tower and prefill; the choice between them ("prompt") has no FLOPs
                and counts as time wherever the tower does.

        Returns:
            None when the plan saves no FLOPs.
        """
        timed = (*phases, "prompt") if "tower" in phases else phases
        saved = 1.0 - _sum(self.flops, phases) / _sum(full.flops, phases)
        if saved <= 0.0:
            return None
        return (1.0 - _sum(self.seconds, timed) / _sum(full.seconds, timed)) / saved


def _sum(figures: Mapping[str, float], phases: Sequence[str]) -> float:
    return sum(figures.get(phase, 0) for phase in phases)


def clock(device: torch.device) -> float:
    """Return seconds, after the device's queue has drained."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
