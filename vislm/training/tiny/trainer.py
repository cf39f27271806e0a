"""Model, optimizer and the step of the training: every batch follows from seed, stage and step alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from vislm.errors import TrainingError
from vislm.training.tiny.losses import PresenceHeads, alignment_loss, dense_labels
from vislm.training.tiny.model import build_model, set_embeddings, start_language_model
from vislm.training.tiny.packing import pack, packed_logits
from vislm.training.tiny.pixels import to_pixels
from vislm.training.tiny.samples import EasyVqa, draw_scene, first_phase, mixed
from vislm.training.tiny.stages import Stage


class Trainer:
    """Model, optimizer and place in the recipe."""

    def __init__(self, seed: int, stages: tuple[Stage, ...]) -> None:
        self.seed, self.stages = seed, stages
        self.stage, self.step = 0, 0
        self.vqa = EasyVqa() if any(s.mixture.easy_vqa for s in stages) else None
        torch.manual_seed(seed)
        self.model: LlavaForConditionalGeneration = build_model()
        self.heads = PresenceHeads()
        set_embeddings(self.model, torch.Generator().manual_seed(seed))
        self.optimizer = self.make_optimizer(stages[0])

    def modules(self, stage: Stage) -> list[nn.Module]:
        """Return the modules that a stage trains."""
        inner = self.model.model
        if stage.trains == "tower":
            return [inner.vision_tower, inner.multi_modal_projector, self.heads]
        return [inner.language_model, inner.multi_modal_projector]

    def make_optimizer(self, stage: Stage) -> torch.optim.AdamW:
        for parameter in (*self.model.parameters(), *self.heads.parameters()):
            parameter.requires_grad_(False)
        decay, plain = [], []
        for module in self.modules(stage):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(True)
                matrix = parameter.dim() > 1 and "embed" not in name
                (decay if matrix else plain).append(parameter)
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=stage.peak_lr, betas=(0.9, 0.98))

    def enter(self, stage: Stage) -> None:
        """Prepare a stage: start the language model before the first that trains it, renew the optimizer."""
        first = next((s for s in self.stages if s.trains == "language"), None)
        if stage is first:
            start_language_model(self.model, torch.Generator().manual_seed(self.seed + 1))
        if not stage.keeps_optimizer:
            self.optimizer = self.make_optimizer(stage)

    def train_step(self) -> tuple[float, dict[str, float]]:
        """Take the next step of the current stage; return loss and measures."""
        stage = self.stages[self.stage]
        rng = np.random.default_rng((self.seed, self.stage, self.step))
        loss, log = (self._align if stage.trains == "tower" else self._converse)(stage, rng)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            raise TrainingError(f"loss {loss.item()} or gradient norm {norm.item()} at {stage.name} step {self.step}")
        for group in self.optimizer.param_groups:
            group["lr"] = stage.lr(self.step)
        self.optimizer.step()
        self.step += 1
        return loss.item(), log

    def _align(self, stage: Stage, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        first = self.step * stage.batch
        scenes = [draw_scene(stage.mixture, stage.stream, first + i, rng) for i in range(stage.batch)]
        return alignment_loss(self.model, self.heads, to_pixels([s.image for s in scenes]), dense_labels(scenes))

    def _converse(self, stage: Stage, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        images, turns = [], []
        for i in range(stage.batch):
            if self.vqa and rng.random() < stage.mixture.easy_vqa:
                image, conversation = self.vqa.draw(rng)
            else:
                scene = draw_scene(stage.mixture, stage.stream, self.step * stage.batch + i, rng)
                image = scene.image
                if stage.name == "B1":
                    conversation = first_phase(scene, rng)
                else:
                    conversation = mixed(scene, rng, stage.mixture.present, stage.mixture.absent)
            images.append(image)
            turns.append(conversation)
        packed = pack(turns)
        logits = packed_logits(self.model, packed, self.features(to_pixels(images)))
        losses = cross_entropy(logits, packed.targets, reduction="none")
        return (losses * packed.weights).sum() / packed.weights.sum(), {}

    def features(self, pixels: Tensor) -> Tensor:
        """Return projected patches (B, 64, C); the tower is frozen while the language model learns."""
        with torch.no_grad():
            hidden = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        return self.model.model.multi_modal_projector(hidden[:, 1:])
