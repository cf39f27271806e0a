"""The training loop: every batch follows from seed, stage and step alone, so a killed run continues bit for bit."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from vislm.errors import CheckpointError, UsageError
from vislm.training.tiny import checkpoint
from vislm.training.tiny.development import Development
from vislm.training.tiny.export import export
from vislm.training.tiny.losses import PresenceHeads, alignment_loss, dense_labels
from vislm.training.tiny.model import build_model, set_embeddings, start_language_model
from vislm.training.tiny.packing import pack, packed_logits
from vislm.training.tiny.pixels import to_pixels
from vislm.training.tiny.samples import EasyVqa, draw_scene, first_phase, mixed
from vislm.training.tiny.stages import Stage, recipe

SAVE_EVERY = 100
GATE = (150, 0.9)
"""At this step of B1 the flat AUROC must be above this, or the start of the language model is wrong."""


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
            raise UsageError(f"loss {loss.item()} or gradient norm {norm.item()} at {stage.name} step {self.step}")
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


def train_tiny(
    out: Path,
    *,
    seed: int = 0,
    resume: bool = True,
    threads: int | None = None,
    scale: float = 1.0,
    report: Callable[[str], None] = print,
) -> Path:
    """Train vislm-tiny from scratch and export it.

    Args:
        out: run folder for the checkpoint, the log (log.jsonl) and the finished model (model/).
        seed: of the weights and of all data.
        resume: continue a killed run in ``out``; False starts anew.
        threads: CPU threads; None leaves torch's setting.
        scale: fraction of the recipe's steps, for tests.
        report: gets a line now and then.

    Returns:
        The folder of the finished model, in transformers' format.

    Raises:
        CheckpointError: the folder holds a run with other settings.
        UsageError: easy-vqa is missing, or the loss is not finite.
    """
    if threads:
        torch.set_num_threads(threads)
    stages = recipe(seed, scale)
    trainer = Trainer(seed, stages)
    settings = {"seed": seed, "scale": scale, "stages": [_plain(s) for s in stages]}
    out.mkdir(parents=True, exist_ok=True)
    if resume and checkpoint.exists(out):
        checkpoint.load(out, trainer, settings)
        done = trainer.stage == len(stages)
        report("already trained" if done else f"resuming at {stages[trainer.stage].name} step {trainer.step}")
    development = Development()
    log = (out / "log.jsonl").open("a", encoding="utf-8")
    with log, _interruptible() as interrupted:
        started = time.perf_counter()
        while trainer.stage < len(stages):
            stage = stages[trainer.stage]
            if trainer.step == 0:
                trainer.enter(stage)
            loss, measures = trainer.train_step()
            if trainer.step % SAVE_EVERY == 0 or trainer.step == stage.steps:
                if stage.trains == "language":
                    measures = development.measure(trainer)
                row = {"stage": stage.name, "step": trainer.step, "loss": loss, **measures}
                row["seconds"] = time.perf_counter() - started
                log.write(json.dumps(row) + "\n")
                log.flush()
                report(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
                if stage.name == "B1" and trainer.step >= GATE[0] and scale >= 1.0 and measures["flat_auroc"] < GATE[1]:
                    raise CheckpointError(
                        f"flat AUROC {measures['flat_auroc']:.3f} at step {trainer.step} of B1: no grounding"
                    )
            if trainer.step == stage.steps:
                trainer.stage, trainer.step = trainer.stage + 1, 0
            if trainer.step % SAVE_EVERY == 0 or interrupted():
                checkpoint.save_run(out, trainer, settings)
            if interrupted():
                report("interrupted; run again to continue")
                raise SystemExit(128 + interrupted.signal)
    return export(trainer.model, out / "model")


def _plain(stage: Stage) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(stage)))


class _Flag:
    signal = 0
    """Number of the signal that came; 0 before."""

    def __call__(self) -> bool:
        return self.signal > 0


def _interruptible() -> Any:
    """A context whose value tells whether SIGINT or SIGTERM has come; a second signal acts at once."""
    import contextlib

    @contextlib.contextmanager
    def context() -> Iterator[_Flag]:
        flag = _Flag()

        def handler(number: int, frame: object) -> None:
            flag.signal = number
            for name, previous in old.items():
                signal.signal(name, previous)

        try:
            old = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread
            old = {}
        try:
            yield flag
        finally:
            for name, previous in old.items():
                signal.signal(name, previous)

    return context()
