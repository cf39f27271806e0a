"""The authors' names for our parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import Tensor

from vislm.backbones import official_agent, official_stvit
from vislm.backbones.factory import Model, create_model
from vislm.backbones.weights import load_state

V = TypeVar("V")
Replacement = str | Callable[[re.Match[str]], str]

RENAMES: tuple[tuple[str, Replacement], ...] = (
    # NAT, DiNAT (levels) and DiNAT_s (layers): a downsampler ends the level that ours opens.
    (r"^(?:levels|layers)\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"^(?:levels|layers)\.", "stages."),
    (r"^patch_embed\.", "stem."),
    (r"\.(?:gamma|layer_scale_)([12])$", r".ls\1.gamma"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    # SG-Former, MoH-ViT: parts numbered by stage.
    (r"^patch_embed1\.", "stem."),
    (r"^patch_embed(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.downsample."),
    (r"^pos_embed$", "stem.pos_embed"),
    (r"^block(\d)\.(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks.{match[2]}."),
    (r"^norm4\.", "norm."),
    (r"^norm([123])\.", lambda match: f"stages.{int(match[1]) - 1}.norm."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"(^|\.)(wg(?:_[01])?\.weight)$", r"\1router.\2"),
)
"""Official name (regular expression) -> ours; timm's HaloNet names are ours already."""


def convert(state: Mapping[str, V]) -> dict[str, V]:
    """Return an official state dict under our names."""
    renames = RENAMES + official_agent.RENAMES
    if any(official_agent.VIT_MARKER.search(name) for name in state):
        renames = official_agent.VIT_RENAMES
    if any(official_stvit.MARKER.search(name) for name in state):
        renames += official_stvit.RENAMES
    unused = (official_agent.UNUSED, official_stvit.UNUSED)
    kept = {name: entry for name, entry in state.items() if not any(pattern.search(name) for pattern in unused)}
    return dict(_converted(name, entry, renames) for name, entry in kept.items())


def from_official(name: str, state: Mapping[str, Any], **overrides: Any) -> Model:
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


def _converted(name: str, entry: V, renames: tuple[tuple[str, Replacement], ...]) -> tuple[str, V]:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    if name.endswith(".gamma") and isinstance(entry, Tensor):  # STViT's have the shape (1, C, 1, 1)
        entry = cast(V, entry.flatten())
    return name, entry
