"""What a method may ask of a running model: the vocabulary shared by token pruning and head editing.

A method is a frozen dataclass with a ``name`` and one function, ``plan(adapter)``, that returns stages. A stage says
where it acts, which signal it needs there, and what it decides from it; the session does the rest. Stages see views:
plain records of tensors, so that the deciding functions stay pure and testable without any model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from vislm.kernels.matching import Matching
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


@dataclass(frozen=True)
class TowerMergeStage:
    """Merge patches in vision layer ``layer``, between attention and MLP."""

    layer: int
    """0-based; at most the layer that the language model reads."""
    match: Callable[[AttentionCall], Matching]
    """Says in the attention of this layer which tokens become one. Prefix tokens are matched too: they have to stay
    alone and in front."""
    prop_attn: bool = True
    """From the next layer on a key that stands for s tokens counts s times."""
    positions: Positions = "contiguous"


@dataclass(frozen=True)
class TowerSignal:
    """A signal that a prompt stage takes in the attention of one vision layer, while the tower runs untouched."""

    layer: int
    """Vision layer, 0-based; ``adapter.read_layer`` is the one whose output the language model reads."""
    signal: Callable[[AttentionCall], Tensor]
    """Returns a tensor (K, ...) for K crops; prefix tokens are the first columns of the call."""


@dataclass
class TowerRecord:
    """What the tower computed for one image of K crops with N patches each (a tower without crops has K = 1)."""

    signals: dict[str, Tensor]
    """Name -> (K, ...), as the stage's ``TowerSignal`` returned it."""
    features: Tensor | None
    """(K, P + N, Cv) output of the read layer, P prefix tokens first; None where a merger or shuffle joins patches
    before the projector, so that features have no meaning per token."""
    pixels: Tensor | None
    """(K, 3, H, W) normalised pixels as the model received them; None where the processor cuts them into patches."""


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


@dataclass
class BiasView:
    """One attention of the language model, before its softmax. Nq queries are the last of Nk keys."""

    layer: int
    cos: Tensor
    """(B, Nk, d) rotary cosine of every key's position; the last Nq rows are the queries'."""
    sin: Tensor
    """(B, Nk, d) rotary sine."""
    size: Tensor
    """(B, Nk) float32: original tokens that each key stands for."""
    queries: int
    """Nq."""
    reduced: Tensor
    """(B,) bool: samples whose layer holds fewer visual tokens than their full prompt."""


@dataclass(frozen=True)
class BiasStage:
    """Add to the attention logits of decoder layers, at every position and step."""

    bias: Callable[[BiasView], Tensor]
    """Returns (B, 1, Nq, Nk) in float32."""
    layers: frozenset[int] | None = None
    """None: all."""
    per_layer: bool = True
    """False: the same in all layers that hold the same keys, so that it is computed once for them."""


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


Stage = TowerStage | TowerMergeStage | PromptStage | LanguageStage | BiasStage | HeadStage


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
    merged_into: list[list[int]] | None = None
    """Per image and original token: the kept token (number in ``index``) that it went into, -1 if it was dropped; None
    if nothing was merged."""
