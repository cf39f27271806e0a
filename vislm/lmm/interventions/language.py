"""Stages that drop tokens inside the language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vislm.lmm.choosing.tokens import top_per_image
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions.counting import Expected, Positions


@dataclass
class LanguageView:
    """What a language stage decides from. S prompt columns alive before the layer."""

    signal: Any
    image_of: Tensor
    """(B, S) int64: number of the image that a column belongs to, -1 for text and padding."""
    memory: dict[str, Any]
    """The method's own; what its prompt stage stored is there."""
    hidden: Tensor
    """(B, S, C) hidden states that are about to enter the layer."""
    embeddings: Tensor
    """(B, P, C) the prompt as it entered decoder layer 0."""
    columns: Tensor
    """(B, S) int64: which of those P columns are alive."""
    token_of: Tensor
    """(B, S) int64: index of a visual column in its image's full token sequence, -1 for text and padding."""
    visual_tokens: list[int]
    """Visual tokens of every image in the full prompt."""
    rotary: tuple[Tensor, Tensor]
    """(cos, sin), each (B or 1, S, d), of the columns' positions."""
    size: Tensor
    """(B, S) float32: how many original tokens each column stands for."""

    def top_per_image(self, scores: Tensor, keep: int | float) -> Tensor:
        """Return keep (B, S) bool: all text, and of each image the ``keep`` columns with the highest scores (B, S)."""
        return top_per_image(scores, self.image_of, keep)


@dataclass(frozen=True)
class LanguageSelection:
    """What stays of S columns, and what the kept ones hold."""

    keep: Tensor
    """(B, S) bool: columns that stay; False on a text column is an error."""
    hidden: Tensor | None = None
    """(B, S, C) their hidden states; rows of dropped columns are ignored. None: unchanged."""
    size: Tensor | None = None
    """(B, S) how many tokens each column stands for; None: unchanged."""


@dataclass(frozen=True)
class LanguageStage:
    """Drop or merge visual tokens before decoder layer ``before_layer``, during prefill."""

    before_layer: int
    signal_layer: int | None
    """Decoder layer in whose attention ``signal`` is taken. An earlier one sees its real attention call; the layer
    ``before_layer`` itself projects the last row's query and all keys of the columns alive. None: no signal."""
    signal: Callable[[AttentionCall], Any]
    select: Callable[[LanguageView], Tensor | LanguageSelection]
    """Returns keep (B, S) bool, or a selection with new contents."""
    positions: Positions = "original"
    expected: Expected | None = None
    """How many tokens will be left, where that can be said without the image; see ``assumes``."""
    assumes: str | None = None
    """What ``expected`` takes for granted where the number depends on the image; None: it is exact."""
