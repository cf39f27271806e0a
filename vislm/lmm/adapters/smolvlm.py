"""SmolVLM: Idefics3's layout on small models; video frames are images between timestamps.

Source: Marafioti et al., "SmolVLM: Redefining small and efficient multimodal models", 2025, arXiv 2504.05299;
transformers ``models/smolvlm``.
"""

from __future__ import annotations

from torch import Tensor

from vislm.lmm.adapters.idefics3 import Idefics3Adapter


class SmolVLMAdapter(Idefics3Adapter):
    """Names the parts of a SmolVLM model."""

    family = "smolvlm"

    @staticmethod
    def _real(tiles: Tensor) -> Tensor:
        """Return (K,) bool: tiles that are encoded; an empty batch keeps its first one."""
        real = tiles.flatten(1).ne(0.0).any(1)
        real[0] |= ~real.any()
        return real
