"""What a calibration is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from vislm.calibration.scores import Score
from vislm.errors import UnknownName, UsageError

What = Literal["sinks", "ad_hh", "act", "zerotuning"]


@dataclass(frozen=True)
class Settings:
    """The options of all searches; each reads its own."""

    what: What
    seed: int = 0
    """Of the choice of samples."""
    batch_size: int = 16
    """Heads that are tried in one forward; but for rounding, the findings do not depend on it."""
    layers: tuple[int, ...] | None = None
    """Decoder layers that are searched; None: all (ad_hh, zerotuning), or all but the first two and the last (act)."""
    score: Score = "accuracy"
    """What act and zerotuning raise."""
    tau: float = 20.0
    """sinks: mean normalised activation above which a dimension is one of theirs."""
    top: int = 20
    """ad_hh: heads in the list."""
    max_new_tokens: int = 128
    """ad_hh: length of a caption."""
    beta: float = 0.4
    """act: as the method's."""
    threshold: float = 0.1
    """act: as the method's."""
    up: float = 1.5
    """zerotuning: factor above 1 that heads are tried with."""
    down: float = 0.6
    """zerotuning: factor below 1 that heads are tried with."""
    gammas: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.25, 1.5, 2.0, 3.0)
    """zerotuning: factors to choose from for the heads that were found."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no search can have."""
        for name, value, known in (("what", self.what, get_args(What)), ("score", self.score, get_args(Score))):
            if value not in known:
                raise UnknownName(name, value, known)
        for name in ("batch_size", "top", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: expected a whole number >= 1")
        if self.seed < 0 or not self.tau > 0.0:
            raise UsageError(f"seed={self.seed}, tau={self.tau}: expected a seed >= 0 and tau > 0")
        for name in ("beta", "threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"{name}={getattr(self, name)}: expected a share between 0 and 1")
        if not 0.0 < self.down < 1.0 < self.up < math.inf:
            raise UsageError(f"down={self.down}, up={self.up}: expected 0 < down < 1 < up")
        if not all(0.0 < gamma < math.inf for gamma in self.gammas):
            raise UsageError(f"gammas={self.gammas}: expected factors > 0")
        if not any(gamma > 1.0 for gamma in self.gammas) or not any(gamma < 1.0 for gamma in self.gammas):
            raise UsageError(f"gammas={self.gammas}: expected factors on both sides of 1")

    def chosen_layers(self, depth: int) -> list[int]:
        """Return the layers that are searched, ascending.

        Raises:
            UsageError: a layer that the model of ``depth`` layers does not have.
        """
        if self.layers is None:
            return list(range(2, depth - 1) if self.what == "act" else range(depth))
        outside = sorted(layer for layer in self.layers if not 0 <= layer < depth)
        if outside:
            raise UsageError(f"layers={outside}: the model has layers 0..{depth - 1}")
        return sorted(set(self.layers))

    def fingerprint(self) -> dict[str, object]:
        """Return what determines the findings, of the options that this search reads."""
        own = {
            "sinks": ("tau",),
            "ad_hh": ("max_new_tokens",),
            "act": ("score", "beta", "threshold"),
            "zerotuning": ("score", "up", "down"),
        }
        return {name: getattr(self, name) for name in ("what", "seed", *own[self.what])}
