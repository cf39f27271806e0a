"""Pictures of 64 x 64 pixels as the tower's input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Return (B, 3, 64, 64) float32, as the processor makes them."""
    values = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255.0
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (values - mean) / std
