"""What a method may ask of a running model: the vocabulary shared by token pruning and head editing.

A method is a frozen dataclass with a ``name`` and one function, ``plan(adapter)``, that returns stages. A stage says
where it acts, which signal it needs there, and what it decides from it; the session does the rest. Stages see views:
plain records of tensors, so that the deciding functions stay pure and testable without any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from vislm.lmm.attention import AttentionCall
from vislm.lmm.tokens import top_per_image

if TYPE_CHECKING:
    from vislm.lmm.adapters import Adapter

Positions = Literal["original", "contiguous"]
"""Position ids of the tokens that stay: as in the full prompt, or numbered anew without gaps."""


@dataclass
class TowerView:
    """What a tower stage decides from. B images (or crops), N candidate patches still alive (prefix excluded)."""

    signal: Any
    """What the stage's ``signal`` returned in the attention of this layer."""
    layer: int
    valid: Tensor | None
    """(B, N) bool, False on padding (images may keep different numbers for a while); None when nothing is padding."""
    num_patches: int
    """Patches of the full grid."""
    memory: dict[str, Any]
    """The method's own state during one encoding; gathered by the method itself (see ``kept``)."""


@dataclass(frozen=True)
class TowerStage:
    """Drop patches after vision layer ``after_layer``; CLS and registers are never candidates."""

    after_layer: int
    signal: Callable[[AttentionCall], Any]
    select: Callable[[TowerView], Tensor | None]
    """Returns keep (B, N) bool, or None to leave the tokens alone after this layer."""
    kept: Callable[[dict[str, Any], Tensor], None] = lambda memory, index: None
    """Called with the memory and the gathered local indices (B, n) so that per-token state can follow."""
    positions: Positions = "contiguous"


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


@dataclass(frozen=True)
class PromptStage:
    """Drop visual tokens before the language model sees them."""

    select: Callable[[ImageView], Tensor]
    """Returns keep (n,) bool."""
    positions: Positions = "original"


@dataclass
class LanguageView:
    """What a language stage decides from. S prompt columns alive before the layer."""

    signal: Any
    image_of: Tensor
    """(B, S) int64: number of the image that a column belongs to, -1 for text and padding."""
    memory: dict[str, Any]

    def top_per_image(self, scores: Tensor, keep: int | float) -> Tensor:
        """Return keep (B, S) bool: all text, and of each image the ``keep`` columns with the highest scores (B, S)."""
        return top_per_image(scores, self.image_of, keep)


@dataclass(frozen=True)
class LanguageStage:
    """Drop visual tokens before decoder layer ``before_layer``, during prefill.

    ``signal`` is taken in the attention of decoder layer ``signal_layer`` < ``before_layer``.
    """

    before_layer: int
    signal_layer: int
    signal: Callable[[AttentionCall], Any]
    select: Callable[[LanguageView], Tensor]
    """Returns keep (B, S) bool; False on a text column is an error."""
    positions: Positions = "original"


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
    text_only: Literal["no", "both", "image_only"] = "no"
    """Run the prompt without image tokens beside the real one; "both" scales that stream's heads as well."""


Stage = TowerStage | PromptStage | LanguageStage | HeadStage


@runtime_checkable
class Intervention(Protocol):
    """A method: its options are the dataclass's fields, its behaviour is what ``plan`` returns."""

    @property
    def name(self) -> str:
        """The name in the registry, the command line and reports."""
        ...

    def plan(self, adapter: Adapter) -> Sequence[Stage]:
        """Return the stages for this model, or raise ``PlanConflict`` / ``UsageError`` if it cannot act on it."""
        ...


@dataclass
class Kept:
    """Which of an image's visual tokens were still there after a stage (indices into its full token sequence)."""

    where: str
    index: list[list[int]] = field(default_factory=list)
