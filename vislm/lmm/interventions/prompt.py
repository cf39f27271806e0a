"""Stages between tower and language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vislm.lmm.interventions.counting import Expected, Positions
from vislm.lmm.interventions.tower import TowerRecord, TowerSignal


@dataclass
class ImageView:
    """One image's visual tokens before the language model. n tokens in prompt order."""

    features: Tensor
    """(n, C) projected features; rows that the tower dropped are NaN and are not candidates."""
    candidates: Tensor
    """(n,) bool: patch tokens that are still alive (no newline tokens)."""
    sample: int
    """Row of the batch."""
    image: int
    """Number of the image within the call."""
    memory: dict[str, Any]
    tower: TowerRecord | None = None
    """What the tower computed; None unless the stage asked for ``tower`` signals."""
    pack: Callable[[Tensor, float], Tensor] | None = None
    """``pack(maps, newline)``: bring maps (K, N, c) of patches into the order of the tokens, (n, c), by what the model
    does with its features (tiling, unpadding, pooling; a cell that becomes one token gives its mean). Newline
    tokens get the value ``newline``. Comes with ``tower``."""
    project: Callable[[Tensor], Tensor] | None = None
    """``project(features)``: (m, Cv) -> (m, C), the model's projector. None where ``tower.features`` is."""
    text_ids: Tensor | None = None
    """(t,) the prompt's ids without visual placeholders and padding."""
    span: tuple[int, int, int] | None = None
    """Token grid (frames, rows, columns), for ``adapter.grids(features, span)``; None where the features tell it."""
    question: str | None = None
    """The question in plain text, where it is known: from ``lmm.ask``, or set as ``session.questions``."""


@dataclass(frozen=True)
class Selection:
    """What stays of n visual tokens: the seats (columns of the prompt) that are kept, and what sits in them."""

    keep: Tensor
    """(n,) bool: seats that stay, m of them."""
    features: Tensor | None = None
    """(m, C) the tokens in the kept seats, in order; None: the tokens that were there before."""
    size: Tensor | None = None
    """(m,) how many original tokens each one stands for; None: one."""
    source: Tensor | None = None
    """(n,) int64: the kept seat (0..m-1) that an original token went into, -1 if it was dropped; None: only kept
    tokens are in their own seats. For pictures and calibration."""


@dataclass(frozen=True)
class PromptStage:
    """Drop or merge visual tokens before the language model sees them."""

    select: Callable[[ImageView], Tensor | Selection]
    """Returns keep (n,) bool, or a selection with new contents."""
    positions: Positions = "original"
    tower: Mapping[str, TowerSignal] = field(default_factory=dict)
    """Signals wanted from the tower. Give any (or ``needs_tower``) to get ``ImageView.tower``."""
    needs_tower: bool = False
    expected: Expected | None = None
    """How many tokens will be left, where that can be said without the image; see ``assumes``."""
    assumes: str | None = None
    """What ``expected`` takes for granted where the number depends on the image; None: it is exact."""


@dataclass(frozen=True)
class ProbeStage:
    """Look at every image's tokens and at the vision tower, and drop nothing."""

    see: Callable[[ImageView], None]
    tower: Mapping[str, TowerSignal] = field(default_factory=dict)
    needs_tower: bool = False
    all_tokens: bool = False
    """The method speaks of single image tokens later: with a method that drops or merges any, the plan is refused."""


@dataclass
class Kept:
    """Which of an image's visual tokens were still there after a stage (indices into its full token sequence)."""

    where: str
    index: list[list[int]] = field(default_factory=list)
    merged_into: list[list[int]] | None = None
    """Per image and original token: the kept token (number in ``index``) that it went into, -1 if it was dropped; None
    if nothing was merged."""
