"""The training loop: every batch follows from seed, stage and step alone, so a killed run continues bit for bit."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vislm.errors import TrainingError
from vislm.training.tiny import checkpoint
from vislm.training.tiny.development import Development
from vislm.training.tiny.export import export
from vislm.training.tiny.stages import Stage, recipe
from vislm.training.tiny.trainer import Trainer

SAVE_EVERY = 100
GATE = (150, 0.9)
"""At this step of B1 the flat AUROC must be above this, or the start of the language model is wrong."""


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
        UsageError: easy-vqa is missing.
        TrainingError: the loss is not finite, or the model does not look at the image.
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
                    raise TrainingError(
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


@contextlib.contextmanager
def _interruptible() -> Iterator[_Flag]:
    """A context whose value tells whether SIGINT or SIGTERM has come; a second signal acts at once."""
    flag, old = _Flag(), {}

    def handler(number: int, frame: object) -> None:
        flag.signal = number
        for name, previous in old.items():
            signal.signal(name, previous)

    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        old.update({n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield flag
    finally:
        for name, previous in old.items():
            signal.signal(name, previous)
