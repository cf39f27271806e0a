"""The cost model: exact FLOPs and key-value bytes of a run from the configuration and the tokens per layer.

One multiply-add counts as 2 FLOPs; attention counts the full square of tokens. Published figures of other papers use
other conventions (many count a multiply-add once and ignore the gate of a gated MLP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vislm.errors import UsageError


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
        """Read the sizes from a transformers text configuration.

        Raises:
            UsageError: a mixture of experts, whose cost depends on the routing.
        """
        if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
            raise UsageError(f"{config.model_type} is a mixture of experts, which the cost model does not count")
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
    """Sizes of a ViT tower and its projector (or merger)."""

    layers: int
    width: int
    mlp_width: int
    patches: int | None
    """Patches of one image or crop; None where the image decides."""
    prefix: int
    patch_values: int
    """Numbers in one patch: channels x frames x patch height x patch width."""
    projector_width: int
    mlp_matrices: int = 2
    """3 for a gated MLP, 2 for a plain one."""
    cell: int = 1
    """Patches that the projector joins into one token."""
    projector_weights: int | None = None
    """Weights that the projector multiplies for one token; None: LLaVA's two layers."""

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
        """Return the FLOPs of one image of fixed size.

        Args:
            tokens: patches that enter each layer; None: all in every layer.
            projected: patches that reach the projector; None: all.
        """
        assert self.patches is not None
        tokens = tokens or [self.patches] * self.layers
        reached = self.patches if projected is None else projected
        return self.batch_flops([[n + self.prefix] for n in tokens], self.patches, reached // self.cell)

    def batch_flops(
        self, segments: Sequence[Sequence[int]], patches: int, projected: int, mlp_tokens: Sequence[int] | None = None
    ) -> int:
        """Return the FLOPs of one call of the tower and its projector.

        Args:
            segments: for each layer the tokens that attend to each other, one number per crop, frame or window.
            patches: of all images together, as they are embedded.
            projected: tokens that the projector produces.
            mlp_tokens: for each layer the tokens that run through its MLP; None: those that attend.
        """
        c = self.width
        total = 2 * patches * self.patch_values * c
        tokens = [sum(layer) for layer in segments]
        for layer, attending, fed in zip(segments, tokens, mlp_tokens or tokens, strict=True):
            total += 8 * c * c * attending + 4 * c * sum(n * n for n in layer)
            total += 2 * self.mlp_matrices * c * self.mlp_width * fed
        return total + self.projector_flops(projected)

    def projector_flops(self, tokens: int) -> int:
        """Return the FLOPs of making ``tokens`` tokens out of the tower's features."""
        c, d = self.width, self.projector_width
        return 2 * tokens * (c * d + d * d if self.projector_weights is None else self.projector_weights)
