"""Backbones to analyse, by name: those of vislm and timm, and the image towers of open_clip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vislm.errors import CheckpointError, UnknownName, UsageError
from vislm.report.attention_views.loading import Backbone, load_backbone

PREFIX = "open_clip:"


@dataclass(frozen=True)
class Vision:
    """A model in evaluation mode and what it takes to show it a picture."""

    model: nn.Module
    backbone: Backbone

    @property
    def trained(self) -> bool:
        """Whether it has weights from anywhere."""
        return self.backbone.trained

    def shown(self, picture: Image.Image, images: int = 1) -> Image.Image:
        """Return the picture in the size that the model sees it in; several images all get the model's own size."""
        height, width = self.backbone.sides((picture.height, picture.width)) if images == 1 else self.backbone.size
        return picture.resize((width, height), Image.Resampling.BICUBIC)

    def pixels(self, shown: Image.Image) -> Tensor:
        """Return the normalised pixels (1, 3, H, W)."""
        return self.backbone.normalized(torch.from_numpy(np.array(shown, dtype=np.float32)))


def load_vision(
    name: str,
    *,
    weights: Path | None = None,
    pretrained: bool = False,
    size: tuple[int, int] | None = None,
    seed: int = 0,
) -> Vision:
    """Return a model by name.

    Args:
        name: as :func:`~vislm.report.attention_views.loading.load_backbone` knows it, or "open_clip:ARCHITECTURE".
        weights: a safetensors file of the model's own state dict.
        pretrained: the library's weights, which may have to be downloaded ("open_clip:ARCHITECTURE/TAG" names them).
        size: (H, W) of the picture.
        seed: of random weights.

    Raises:
        UnknownName: no such model.
        UsageError: options that do not fit.
        CheckpointError: weights that cannot be had.
    """
    if not name.startswith(PREFIX):
        backbone = load_backbone(name, weights=weights, pretrained=pretrained, size=size, seed=seed)
        return Vision(backbone.model, backbone)
    import open_clip

    architecture, _, tag = name.removeprefix(PREFIX).partition("/")
    if architecture not in open_clip.list_models():
        raise UnknownName("model of open_clip", architecture, open_clip.list_models())
    if weights is not None or (size is not None and size[0] != size[1]):
        raise UsageError(f"{name}: --weights is not for open_clip, and --size has to be square")
    options: dict[str, Any] = {} if size is None else {"force_image_size": size[0]}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        try:
            model: Any = open_clip.create_model(architecture, pretrained=tag if pretrained else None, **options)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"open_clip cannot make {name}: {error}") from error
    side = model.visual.image_size
    height, width = (side, side) if isinstance(side, int) else side
    config = open_clip.get_model_preprocess_cfg(model)
    colours = config.get("mean", open_clip.OPENAI_DATASET_MEAN), config.get("std", open_clip.OPENAI_DATASET_STD)
    return Vision(model.eval(), Backbone(model.eval(), name, pretrained, (height, width), False, *colours))
