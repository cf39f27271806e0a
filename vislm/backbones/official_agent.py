"""The names in Agent Attention's checkpoints, and those of plain ViTs.

Source: https://github.com/LeapLabTHU/Agent-Attention; ``timm.models.vision_transformer``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

UNUSED = re.compile(r"\.(?:attn_mask|relative_position_index)$")
"""Buffers of Swin's windows, which follow from sizes."""

RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^pos_embed(\d)$", lambda match: f"stages.{int(match[1]) - 1}.pos_embed"),
    # Agent-CSwin: the block holds the projections; a branch's convolution is called get_v.
    (r"^stage1_conv_embed\.0\.", "stem.proj."),
    (r"^stage1_conv_embed\.2\.", "stem.norm."),
    (r"^merge(\d)\.conv\.", r"stages.\1.downsample.proj."),
    (r"^merge(\d)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^stage(\d)\.(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks.{match[2]}."),
    (r"(\.blocks\.\d+)\.(qkv|proj|attns)\.", r"\1.attn.\2."),
    (r"\.get_v\.", ".dwc."),
)
"""Official name (regular expression) -> ours."""

VIT_MARKER = re.compile(r"^blocks\.\d")
"""Only a plain ViT has such names; its position table keeps its own, and no rule of the other families applies."""

VIT_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^patch_embed\.", "stem."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
"""timm's and the authors' name -> ours."""
