"""Stages that scale the outputs of heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass
class HeadView:
    """What a head stage decides from, in decoder layer ``layer``."""

    layer: int
    phase: Literal["prefill", "decode"]
    image_output: Tensor
    """(B, H, d) head outputs of the last row, before the output projection and before any scaling of this layer."""
    text_only_output: Tensor | None
    """(B, H, d) the same for the prompt without its image tokens; None at decode or when not asked for."""
    has_image: Tensor
    """(B,) bool: samples that have visual tokens at all."""
    memory: dict[str, Any]


@dataclass(frozen=True)
class HeadStage:
    """Scale head outputs in some decoder layers, before the output projection, at every position and step."""

    layers: frozenset[int]
    scale: Callable[[HeadView], Tensor | None]
    """Returns (B, H) factors, or None to leave the layer alone."""
    text_only: Literal["no", "both", "image_only", "any"] = "no"
    """Run the prompt without image tokens beside the real one; "both" scales that stream's heads as well, "any" takes
    the stream that another stage wants."""
