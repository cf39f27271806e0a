"""Watching the training: presence on flat and on adversarial questions, counts, colours, positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vislm.data.scene_categories import CATEGORIES
from vislm.data.scene_types import Scene
from vislm.data.scenes import co_occurrence, generate_scenes
from vislm.data.turns import colour_turn, count_turn, position_turn, singletons
from vislm.eval.questions.pope_answers import auroc
from vislm.training.tiny.packing import pack, packed_logits
from vislm.training.tiny.pixels import to_pixels
from vislm.training.tiny.samples import Weighted, all_presence
from vislm.training.tiny.vocabulary import IDS

if TYPE_CHECKING:
    from vislm.training.tiny.trainer import Trainer

SCENES, SEED = 160, 777001


class Development:
    """Scenes that no training and no test uses."""

    def __init__(self) -> None:
        self.flat = list(generate_scenes(SCENES, SEED, difficulty="easy", distribution="flat"))
        self.biased = list(generate_scenes(SCENES, SEED))
        together = co_occurrence(generate_scenes(4000, 5))
        np.fill_diagonal(together, 0)
        self.together = together

    @torch.no_grad()
    def measure(self, trainer: Trainer) -> dict[str, float]:
        """Return AUROC and accuracies (fractions)."""
        labels, margins = self._presence(trainer, self.flat)
        flat = auroc(labels.flatten().tolist(), margins.flatten().tolist())
        labels, margins = self._presence(trainer, self.biased)
        chosen = torch.tensor(np.stack([self._adversarial(scene) for scene in self.biased]))
        y, m = labels[chosen], margins[chosen]
        result = {
            "flat_auroc": flat,
            "adversarial_auroc": auroc(y.tolist(), m.tolist()),
            "adversarial_accuracy": ((m > 0) == y).float().mean().item(),
            "yes_share": (m > 0).float().mean().item(),
        }
        for name, make in (("count", count_turn), ("colour", colour_turn), ("position", position_turn)):
            result[name] = self._accuracy(trainer, make, singletons if name == "position" else lambda s: s.present)
        return result

    def _adversarial(self, scene: Scene) -> np.ndarray:
        present = [CATEGORIES.index(c) for c in scene.present]
        absent = [CATEGORIES.index(c) for c in scene.absent]
        k = min(3, len(present))
        near = sorted(absent, key=lambda c: -self.together[c, present].sum())[:k]
        chosen = np.zeros(len(CATEGORIES), dtype=bool)
        chosen[[*present[:k], *near]] = True
        return chosen

    @staticmethod
    def _presence(trainer: Trainer, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        packed = pack([all_presence(s) for s in scenes])
        logits = packed_logits(trainer.model, packed, trainer.features(to_pixels([s.image for s in scenes])))
        margins = (logits[:, IDS["yes"]] - logits[:, IDS["no"]]).view(len(scenes), len(CATEGORIES))
        return (packed.targets == IDS["yes"]).view_as(margins), margins

    def _accuracy(self, trainer: Trainer, make, names) -> float:
        scenes = [s for s in self.biased if names(s)]
        packed = pack([[Weighted(make(s, c)) for c in names(s)] for s in scenes])
        logits = packed_logits(trainer.model, packed, trainer.features(to_pixels([s.image for s in scenes])))
        right = logits.argmax(-1) == packed.targets
        content = packed.turn[:, 1] < (2 if make is position_turn else 1)
        wrong = {tuple(k) for k in torch.cat([packed.where[:, :1], packed.turn[:, :1]], 1)[content & ~right].tolist()}
        return 1.0 - len(wrong) / sum(len(names(s)) for s in scenes)
