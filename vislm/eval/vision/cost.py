"""What a picture costs a vision model: FLOPs counted in one forward, patches before and after merging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vislm.token_pruning.tome import Merging


class PictureCost:
    """FLOPs and tokens of a picture; counted once, as pictures of one size all cost the same."""

    def __init__(self, patches: int | None, merging: Merging | None) -> None:
        self._patches, self._merging = patches, merging
        self._flops: dict[tuple[int, ...], int] = {}

    def of(self, forward: Callable[[Tensor], Any], pixels: Tensor) -> dict[str, int]:
        """Return "flops" (2 per multiply-add: convolutions, matrix products, attention), and for plain vision
        transformers "visual_tokens" and "visual_tokens_kept" (patches of the picture; those that leave the last block).

        Args:
            forward: the model, without gradients.
            pixels: ``(B, 3, H, W)``; the first of them is run, unless the FLOPs of its size are known.
        """
        shape = tuple(pixels.shape[1:])
        if shape not in self._flops:
            self._flops[shape] = count_flops(forward, pixels[:1])
        cost = {"flops": self._flops[shape]}
        if self._patches is not None:
            cost |= {"visual_tokens": self._patches, "visual_tokens_kept": self._kept(self._patches)}
        return cost

    def _kept(self, patches: int) -> int:
        if self._merging is None:
            return patches
        tokens = self._merging.tokens
        return patches - (tokens[0] - tokens[-1])


def count_flops(forward: Callable[[Tensor], Any], pixels: Tensor) -> int:
    """Return the FLOPs of one forward, with attention as plain matrix products, which the counter can see."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            forward(pixels)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def patches_of(model: nn.Module) -> int | None:
    """Return the patches that a plain vision transformer makes of a picture; None for other models."""
    for name in ("visual", "trunk"):
        model = getattr(model, name, model)
    count = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if isinstance(count, int) and hasattr(model, "num_prefix_tokens"):
        return count
    grid = getattr(model, "grid_size", None)
    return grid[0] * grid[1] if isinstance(grid, (tuple, list)) and hasattr(model, "transformer") else None
