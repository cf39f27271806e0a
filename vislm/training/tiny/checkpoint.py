"""Saving and loading a training run: tensors in safetensors, the place in the recipe in their metadata."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vislm.errors import CheckpointError
from vislm.files import atomic_write

if TYPE_CHECKING:
    from vislm.training.tiny.trainer import Trainer

NAME = "checkpoint.safetensors"


def exists(folder: Path) -> bool:
    """Return whether the folder holds a checkpoint."""
    return (folder / NAME).is_file()


def save_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return all tensors of a run by name."""
    tensors = {f"model.{k}": v for k, v in trainer.model.state_dict().items() if k != "lm_head.weight"}
    tensors |= {f"heads.{k}": v for k, v in trainer.heads.state_dict().items()}
    for number, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{k}": torch.as_tensor(v) for k, v in state.items()}
    return {k: v.detach().clone().contiguous() for k, v in tensors.items()}


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def save_run(folder: Path, trainer: Trainer, settings: dict[str, Any]) -> None:
    """Write the run's state atomically."""
    tensors = save_tensors(trainer)
    place = {"stage": trainer.stage, "step": trainer.step, "settings": settings, "digest": _digest(tensors)}
    data = save(tensors, {"place": json.dumps(place)})
    with atomic_write(folder / NAME, "wb") as file:
        file.write(data)


def load(folder: Path, trainer: Trainer, settings: dict[str, Any]) -> None:
    """Restore a run; ``CheckpointError`` if the file is broken or was made with other settings."""
    try:
        with safe_open(folder / NAME, "pt") as file:
            place = json.loads(file.metadata()["place"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / NAME} cannot be read: {error}; start anew with --restart") from error
    if place.get("digest", _digest(tensors)) != _digest(tensors):
        raise CheckpointError(f"{folder / NAME} is damaged: its tensors are not those that were written")
    if place["settings"] != settings:
        names = [k for k in settings if place["settings"].get(k) != settings[k]]
        raise CheckpointError(f"{folder} holds a run with other {', '.join(names)}; use another folder or --restart")
    trainer.stage, trainer.step = place["stage"], place["step"]
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "heads": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    trainer.model.load_state_dict(groups["model"], strict=False)  # lm_head is tied
    trainer.heads.load_state_dict(groups["heads"])
    if trainer.stage < len(trainer.stages):
        _load_optimizer(trainer, groups["optimizer"])


def _load_optimizer(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    owner = trainer.stage if trainer.step else trainer.stage - 1  # a stage's optimizer is made at its first step
    trainer.optimizer = trainer.make_optimizer(trainer.stages[max(owner, 0)])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    full = trainer.optimizer.state_dict()
    trainer.optimizer.load_state_dict({"state": state, "param_groups": full["param_groups"]})
