"""The authors' names for our parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from vislm.backbones.factory import create_model
from vislm.backbones.halonet import HaloNet
from vislm.backbones.hierarchical import Hierarchical
from vislm.backbones.weights import load_state

V = TypeVar("V")
Replacement = str | Callable[[re.Match[str]], str]

RENAMES: tuple[tuple[str, Replacement], ...] = (
    # NAT, DiNAT (levels) and DiNAT_s (layers): a downsampler ends the level that ours opens.
    (r"^(?:levels|layers)\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"^(?:levels|layers)\.", "stages."),
    (r"^patch_embed\.", "stem."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
"""Official name (regular expression) -> ours; timm's HaloNet names are ours already."""


def convert(state: Mapping[str, V]) -> dict[str, V]:
    """Return an official state dict under our names."""
    return {_renamed(name): entry for name, entry in state.items()}


def from_official(name: str, state: Mapping[str, Any], **overrides: Any) -> Hierarchical | HaloNet:
    """Return a variant with the weights of its authors' checkpoint, in evaluation mode.

    Args:
        name: one of :func:`list_models`.
        state: the official state dict, or a checkpoint that holds it under ``model`` or ``state_dict``. Read pickled
            files with ``torch.load(path, weights_only=True)``.
        overrides: as for :func:`create_model`.

    Raises:
        CheckpointError: missing, unexpected or misshapen keys.
    """
    for key in ("model", "state_dict"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    model = create_model(name, **overrides)
    tensors: dict[str, Tensor] = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    load_state(model, convert(tensors), f"the official checkpoint of {name}")
    return model.eval()


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
