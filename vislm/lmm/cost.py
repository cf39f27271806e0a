"""The cost model: exact FLOPs and key-value bytes of a run from the configuration and the tokens per layer.

One multiply-add counts as 2 FLOPs; attention counts the full square of tokens. Published figures of other papers use
other conventions (many count a multiply-add once and ignore the gate of a gated MLP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder-only language model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    mlp_matrices: int = 3
    """3 for a gated MLP, 2 for a plain one."""

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Read the sizes from a transformers text configuration."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            mlp_width=config.intermediate_size,
            vocabulary=config.vocab_size,
        )

    def prefill_flops(self, tokens: Sequence[int]) -> int:
        """Return the FLOPs of one prompt's prefill; ``tokens[l]`` columns enter layer l; logits of the last row."""
        return 2 * self.width * self.vocabulary + self.layer_flops(tokens)

    def layer_flops(self, tokens: Sequence[int]) -> int:
        """Return the FLOPs of the decoder layers alone; ``tokens[l]`` columns enter layer l."""
        inner, d, total = self.heads * self.head_dim, self.width, 0
        for n in tokens:
            total += 2 * n * d * (inner + 2 * self.kv_heads * self.head_dim) + 2 * n * inner * d
            total += 4 * n * n * inner + 2 * self.mlp_matrices * n * d * self.mlp_width
        return total

    def decode_flops(self, context: Sequence[int]) -> int:
        """Return the FLOPs of one decode step; ``context[l]`` keys in layer l, the new one included."""
        inner, d = self.heads * self.head_dim, self.width
        per_layer = 2 * d * (inner + 2 * self.kv_heads * self.head_dim) + 2 * inner * d
        per_layer += 2 * self.mlp_matrices * d * self.mlp_width
        return 2 * d * self.vocabulary + sum(per_layer + 4 * c * inner for c in context)

    def kv_bytes(self, context: Sequence[int], bytes_per_value: int) -> int:
        """Return the size of one sequence's key-value cache; ``context[l]`` keys in layer l."""
        return sum(2 * self.kv_heads * self.head_dim * c * bytes_per_value for c in context)


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a ViT tower and its projector."""

    layers: int
    width: int
    mlp_width: int
    patches: int
    prefix: int
    patch_values: int
    """Numbers in one patch: channels x patch height x patch width."""
    projector_width: int

    @classmethod
    def of(cls, config: Any, prefix: int) -> TowerShape:
        """Read the sizes from a LLaVA-style configuration (vision_config and text_config)."""
        vision = config.vision_config
        return cls(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            mlp_width=vision.intermediate_size,
            patches=(vision.image_size // vision.patch_size) ** 2,
            prefix=prefix,
            patch_values=getattr(vision, "num_channels", 3) * vision.patch_size**2,
            projector_width=config.text_config.hidden_size,
        )

    def flops(self, tokens: Sequence[int] | None, projected: int | None = None) -> int:
        """Return the FLOPs of one image; ``tokens[l]`` patches enter layer l, ``projected`` reach the projector."""
        tokens = tokens or [self.patches] * self.layers
        c, d = self.width, self.projector_width
        total = 2 * self.patches * self.patch_values * c
        for n in (t + self.prefix for t in tokens):
            total += 8 * n * c * c + 4 * n * n * c + 4 * n * c * self.mlp_width
        return total + 2 * (self.patches if projected is None else projected) * (c * d + d * d)
