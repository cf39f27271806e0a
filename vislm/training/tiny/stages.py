"""The stages of the training: what each trains, on what, with which schedule, from which seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vislm.data.scene_types import EASY, HARD, HARD2
from vislm.training.tiny.samples import Mixture


@dataclass(frozen=True)
class Stage:
    """One stage of the training."""

    name: str
    trains: str
    """"tower": vision tower, projector and presence heads; "language": language model and projector."""
    steps: int
    batch: int
    peak_lr: float
    warmup: int
    decays: bool
    """Cosine to 3 % of the peak behind the warm-up, or constant."""
    mixture: Mixture
    stream: int
    """Seed of the scenes."""
    keeps_optimizer: bool = False

    def lr(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        if not self.decays:
            return self.peak_lr
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak_lr * (0.03 + 0.97 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def _halves(difficulty, share: float) -> tuple:
    return ((share / 2, difficulty, "biased"), (share / 2, difficulty, "flat"))


RECIPE = (
    Stage("A0", "tower", 1049, 64, 1.5e-3, 31, True, Mixture(_halves(EASY, 1.0)), 1234),
    Stage("A1", "tower", 531, 64, 1e-3, 32, True, Mixture((*_halves(HARD, 0.8), *_halves(EASY, 0.2))), 1234),
    Stage("B1", "language", 600, 32, 1e-3, 40, False, Mixture(((0.5, HARD, "flat"), (0.5, EASY, "flat"))), 4321),
    Stage(
        "B2",
        "language",
        1170,
        32,
        1e-3,
        23,
        True,
        Mixture(((0.85, HARD2, "biased"), (0.15, EASY, "biased")), easy_vqa=0.08, present=4, absent=2),
        14321,
        keeps_optimizer=True,
    ),
    Stage(
        "B3",
        "language",
        203,
        32,
        5e-4,
        4,
        True,
        Mixture(((1.0, HARD2, "biased"),), easy_vqa=0.12, present=4, absent=1),
        4322,
    ),
)
"""The recipe of the shipped weights, in steps."""


def recipe(seed: int = 0, scale: float = 1.0) -> tuple[Stage, ...]:
    """Return the recipe for a seed; ``scale`` < 1 shortens every stage (for tests)."""
    return tuple(
        replace(
            s,
            stream=s.stream + 100_000 * seed,
            steps=max(2, round(s.steps * scale)),
            warmup=max(1, round(s.warmup * scale)),
        )
        for s in RECIPE
    )
