"""Where a vision transformer of timm or open_clip has its blocks, their attentions and its patch embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from vislm.errors import UsageError


class Tower:
    """A plain vision transformer.

    Attributes:
        blocks: its layers.
        embedding: the convolution that makes a map of patches of the image.
        num_prefix_tokens: class and register tokens in front of the patches.
        rotary: whether its queries and keys are rotated by their positions.
    """

    def __init__(self, blocks: Sequence[nn.Module], embedding: nn.Module, num_prefix_tokens: int, rotary: bool) -> None:
        self.blocks, self.embedding, self.num_prefix_tokens = list(blocks), embedding, num_prefix_tokens
        self.rotary = rotary

    def attention(self, layer: int) -> nn.Module:
        """Return a layer's attention; raise ``UsageError`` if it is not at ``.attn``."""
        attention = getattr(self.blocks[layer], "attn", None)
        if not isinstance(attention, nn.Module):
            raise UsageError(f"layer {layer} is a {type(self.blocks[layer]).__name__}, which has no attention .attn")
        return attention

    def put_attention(self, layer: int, attention: nn.Module) -> None:
        """Put another module at a layer's ``.attn``."""
        self.blocks[layer].add_module("attn", attention)


def tower_of(model: nn.Module) -> Tower:
    """Return the vision tower of a model; raise ``UsageError`` for one that is not as timm or open_clip build them."""
    inner = model
    for name in ("visual", "trunk"):  # an open_clip model, and open_clip's wrapper of a timm model
        inner = getattr(inner, name, inner)
    embedding = getattr(getattr(inner, "patch_embed", None), "proj", getattr(inner, "conv1", None))
    blocks = getattr(getattr(inner, "transformer", inner), "resblocks", getattr(inner, "blocks", None))
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not isinstance(embedding, nn.Conv2d):
        raise UsageError(
            f"{type(inner).__name__} has no blocks behind one convolution of patches, expected a plain vision "
            "transformer of timm (patch_embed.proj, blocks) or open_clip (conv1, transformer.resblocks)"
        )
    # A class token always stands in front in open_clip.
    if getattr(inner, "rel_pos_bias", None) is not None:
        raise UsageError(
            f"the layers of this {type(inner).__name__} share one table of relative positions (rel_pos_bias), which "
            "has no place in some of them alone; expected a table per layer (use_rel_pos_bias), or none"
        )
    num_prefix_tokens = cast(int, getattr(inner, "num_prefix_tokens", 1))
    return Tower(list(blocks), embedding, num_prefix_tokens, getattr(inner, "rope", None) is not None)
