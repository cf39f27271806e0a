"""A backbone by its name or path, with what it takes to show it a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vislm.backbones.factory import create_model
from vislm.backbones.variants import list_models, variant
from vislm.backbones.weights import load_file
from vislm.errors import CheckpointError, UnknownName, UsageError

LONGEST = 8
"""Longer side of a picture in units of the shorter one; what exceeds it is cut off."""
MULTIPLE = 32
"""Sides of a picture are multiples of this, unless given: every stage has whole patches."""


@dataclass(frozen=True)
class Backbone:
    """A model and its preprocessing.

    Attributes:
        model: in evaluation mode.
        name: as it was asked for.
        trained: whether it has weights from anywhere.
        size: ``(H, W)`` of the pictures it is made for.
        free: whether pictures of other sizes may be given.
        mean: of the colours, from 0 to 1.
        deviation: their standard deviation.
    """

    model: nn.Module
    name: str
    trained: bool
    size: tuple[int, int]
    free: bool
    mean: Sequence[float]
    deviation: Sequence[float]

    def sides(self, picture: tuple[int, int]) -> tuple[int, int]:
        """Return ``(H, W)`` to show a picture of ``(height, width)`` at: its own shape, where the model takes it."""
        if not self.free:
            return self.size
        short = min(self.size)
        ratio = [min(side / min(picture), LONGEST) for side in picture]
        height, width = (max(1, round(short * part / MULTIPLE)) * MULTIPLE for part in ratio)
        return height, width

    def normalized(self, pixels: Tensor) -> Tensor:
        """Return ``(1, 3, H, W)`` of pixels ``(H, W, 3)`` from 0 to 255."""
        mean, deviation = torch.tensor(self.mean), torch.tensor(self.deviation)
        return ((pixels / 255 - mean) / deviation).permute(2, 0, 1)[None]


def load_backbone(
    name: str,
    *,
    weights: Path | None = None,
    pretrained: bool = False,
    size: tuple[int, int] | None = None,
    seed: int = 0,
) -> Backbone:
    """Return a backbone in evaluation mode.

    Args:
        name: of :func:`vislm.list_models`, a YAML file of the same form, a name of timm's, or a folder that timm wrote
            (``config.json`` and ``model.safetensors``).
        weights: a safetensors file of the model's own state dict.
        pretrained: timm's weights, which may have to be downloaded.
        size: ``(H, W)`` of the pictures it will be shown; None = those it is made for.
        seed: of random weights.

    Raises:
        UnknownName: an unknown name; names the nearest ones.
        UsageError: ``pretrained`` for a model of vislm, a size that the model cannot take.
        CheckpointError: weights that do not fit or cannot be found.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    ours = name in list_models() or name.endswith((".yaml", ".yml"))
    folder = not ours and Path(name).is_dir()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        if ours:
            if pretrained:
                raise UsageError(f"{name} has no weights to download; give a file: --weights model.safetensors")
            model, side = create_model(name, weights=weights), variant(name).published.input_size
            mean, deviation = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
            return Backbone(
                model.eval(), name, weights is not None, size or (side, side), size is None, mean, deviation
            )
        model = _timm_model(f"local-dir:{name}" if folder else name, pretrained or folder, size)
    if weights is not None:
        load_file(model, weights)
    config: Any = model.pretrained_cfg
    height, width = config["input_size"][1:] if size is None else size
    trained = pretrained or folder or weights is not None
    return Backbone(model.eval(), name, trained, (height, width), False, config["mean"], config["std"])


def _timm_model(name: str, pretrained: bool, size: tuple[int, int] | None) -> nn.Module:
    import timm

    if ":" not in name and not timm.is_model(name):
        raise UnknownName("model", name, [*list_models(), *timm.list_models()])
    options: dict[str, Any] = {}
    if size is not None and timm.models.get_pretrained_cfg_value(name, "fixed_input_size"):
        options["img_size"] = size
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise CheckpointError(f"timm cannot make {name}: {error}") from error
