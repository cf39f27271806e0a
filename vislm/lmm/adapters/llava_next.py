"""LLaVA-NeXT (1.6): a base view and a grid of tiles, whose rows end in a newline token.

Source: Liu et al., "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge", 2024; transformers
``models/llava_next``.
"""

from __future__ import annotations

from torch import Tensor

from vislm.lmm.adapters.llava import Grid, LlavaAdapter


class LlavaNextAdapter(LlavaAdapter):
    """Names the parts of a LLaVA-NeXT model."""

    family = "llava_next"
    default_prompt = "[INST] {images}\n{question} [/INST]"

    @property
    def crops_per_image(self) -> int | None:
        """None: the number of tiles depends on the image's shape."""
        return None

    def is_patch(self, features: Tensor) -> Tensor:
        """Return (n,) bool: False on newline tokens, which equal the model's learned newline embedding."""
        return ~(features == self.inner.image_newline.to(features)).all(-1)

    def grids(self, features: Tensor) -> list[Grid]:
        """Return the base view's grid and, when there are tiles, the unpadded tile grid."""
        height, width = self.patch_grid
        base = [Grid(height, width, start=0, row_stride=width)]
        tail = self.is_patch(features)[height * width :]
        breaks = (~tail).nonzero().flatten()
        if len(tail) <= 1 or not len(breaks):
            return base
        row = int(breaks[0]) + 1
        return [*base, Grid(len(tail) // row, row - 1, start=height * width, row_stride=row)]
