"""What a method may ask of a running model: the vocabulary shared by token pruning and head editing.

A method is a frozen dataclass with a ``name`` and one function, ``plan(adapter)``, that returns stages. A stage says
where it acts, which signal it needs there, and what it decides from it; the session does the rest. Stages see views:
plain records of tensors, so that the deciding functions stay pure and testable without any model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from vislm.kernels.matching import Matching
from vislm.lmm.attention import AttentionCall
from vislm.lmm.tokens import token_count, top_per_image

if TYPE_CHECKING:
    from vislm.lmm.adapters import Adapter
    from vislm.lmm.adapters.base import Grid
    from vislm.lmm.key_groups import KeyGroups

Positions = Literal["original", "contiguous"]
"""Position ids of the tokens that stay: as in the full prompt, or numbered anew without gaps."""


@dataclass(frozen=True)
class Alive:
    """What one image has left when a stage begins, for counting ahead of any run (``expected``)."""

    tokens: int
    """In the tower: patches of one crop. Behind it: visual tokens, separators included."""
    total: int
    """In the tower: patches of the full crop. Behind it: tokens of the full image."""
    first: int = 0
    """Inside the language model: ``tokens`` at the method's first stage there."""
    crops: tuple[int, ...] = ()
    """At a prompt stage: tokens alive of each crop (or frame); separators belong to none."""
    grids: tuple[Grid, ...] = ()
    """At a prompt stage of a full image: the rectangles that its tokens form."""

    @property
    def candidates(self) -> int:
        """Tokens that are no separators."""
        return sum(self.crops)

    def after(self, keep: int | float) -> int:
        """Return what is left when ``keep`` candidates stay; separators go with the first that does not."""
        count = token_count(keep, self.candidates)
        return self.tokens if count == self.candidates else count


Expected = Callable[[Alive], int]
"""Returns how many tokens a stage will leave."""


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
    expected: Expected | None = None
    """How many tokens will be left, where that can be said without the image; see ``assumes``."""
    assumes: str | None = None
    """What ``expected`` takes for granted where the number depends on the image; None: it is exact."""


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
    expected: Expected | None = None
    """How many tokens will be left, where that can be said without the image; see ``assumes``."""
    assumes: str | None = None
    """What ``expected`` takes for granted where the number depends on the image; None: it is exact."""


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
class PrepareView:
    """One decoder attention of the prefill, before its rows are edited."""

    layer: int
    call: AttentionCall
    """The whole call; ``call.statistics`` and ``call.rows`` give what is needed of it without the matrix."""
    keys: KeyGroups
    memory: dict[str, Any]
    hidden: Tensor | None
    """(B, n, C) hidden states that entered the layer, before its norm; None unless the stage ``needs_hidden``."""


@dataclass
class EditView:
    """R rows of one decoder attention that are about to be edited. K keys, H' heads (those listed, or all)."""

    layer: int
    phase: Literal["prefill", "decode"]
    logits: Tensor
    """(B, H', R, K) float32: q . k / sqrt(d), with what bias stages add, before masking."""
    allowed: Tensor
    """(B or 1, 1, R, K) bool: keys that the row may attend to."""
    keys: KeyGroups
    rows: Tensor
    """(R,) indices of the rows among this forward's queries."""
    row_mask: Tensor
    """(B, R) bool: rows whose edit counts; others keep the output that they have."""
    has_image: Tensor
    """(B,) bool."""
    memory: dict[str, Any]
    edited: Tensor | None = None
    """(B, H, R, K) what other stages have made of the rows, for a stage that observes; None: they are as they were."""
    sees_all: bool = False
    """Known beforehand: nothing is hidden, ``allowed`` is True everywhere."""

    def softmax(self, logits: Tensor | None = None) -> Tensor:
        """Return the weights (B, H', R, K) of the logits (this view's own by default) over the allowed keys."""
        if logits is None and self.edited is not None:
            return self.edited
        chosen = self.logits if logits is None else logits
        if self.sees_all:
            return chosen.softmax(-1)
        return chosen.masked_fill(~self.allowed, -torch.inf).softmax(-1)


@dataclass(frozen=True)
class EditStage:
    """Give some rows of attention other weights, in some decoder layers, at the prefill and every later step."""

    layers: frozenset[int]
    edit: Callable[[EditView], Tensor | None]
    """Returns weights (B, H', R, K), which need not sum to 1, or None to leave the rows alone."""
    rows: Literal["last", "after_image", "all"] = "last"
    """Rows of the prefill: the last one, those behind the last visual token, or all. Each decode row is edited."""
    heads: Callable[[int], Sequence[int]] | None = None
    """Heads of a layer that are edited; None: all."""
    prepare: Callable[[PrepareView], None] | None = None
    """Called in each layer of the prefill before its rows are edited."""
    needs_hidden: bool = False
    every_sample: bool = False
    """Samples without an image are edited too."""
    draft: int = 0
    """More than 0: ``generate`` first writes so many tokens of a greedy draft, and this stage acts there only. The
    method's other edits wait for the real answer; they find what its draft left in ``memory``, and as
    ``memory["draft_tokens"]`` (B,) how many tokens each sample's draft has."""
    observes: bool = False
    """Looks only: ``edit`` returns None, and ``EditView.softmax()`` gives the weights that editing stages have left in
    the row. For ``rows`` "last" in all heads."""
    by_row: tuple[str, ...] = ()
    """Names in ``memory`` of {layer: (B, ...)} that tell of the tokens generated so far: they follow the beams. With a
    search that goes back the plan is refused."""


@dataclass(frozen=True)
class ProbeStage:
    """Look at every image's tokens and at the vision tower, and drop nothing."""

    see: Callable[[ImageView], None]
    tower: Mapping[str, TowerSignal] = field(default_factory=dict)
    needs_tower: bool = False
    all_tokens: bool = False
    """The method speaks of single image tokens later: with a method that drops or merges any, the plan is refused."""


@dataclass
class LogitsView:
    """The next-token logits of one step."""

    logits: Tensor
    """(B, V) float32 of the last row."""
    contrast: Tensor | None
    """(B, V) float32 of the contrast stream; None unless the stage has one and a sample has an image."""
    early: dict[int, Tensor]
    """Decoder layer -> (B, V) float32: what enters it in the last row (0: the embedding), through the final norm and
    the output embedding."""
    phase: Literal["prefill", "decode"]
    has_image: Tensor
    """(B,) bool."""
    memory: dict[str, Any]


@dataclass(frozen=True)
class LogitsStage:
    """Change the next-token logits, at every step, whatever the decoding strategy. Several act one after the other."""

    adjust: Callable[[LogitsView], Tensor]
    """Returns new logits (B, V)."""
    contrast: Literal["none", "text_only", "pixels"] = "none"
    """Run the model beside itself with a cache of its own and without any intervention: on the prompt without its
    images, or on the whole prompt with changed pixels."""
    pixels: Callable[[Tensor, dict[str, Any]], Tensor] | None = None
    """``pixels(values, memory)``: the contrast stream's normalised pixels, same shape. Called for every crop (C, H, W),
    or for every image (n, C, T, P, P) where the processor cuts images into n patches of T frames."""
    early_layers: tuple[int, ...] = ()
    every_sample: bool = False
    """Samples without an image are changed too."""


@dataclass
class SearchView:
    """One step of a beam search over one sample. R beams, t tokens generated so far and read by the model."""

    logits: Tensor
    """(R, V) float32 of the next token."""
    tokens: Tensor
    """(R, t)."""
    state: dict[str, Tensor]
    """The method's own, (R, ...) each: follows the beams when they are reordered, and goes back with them."""
    look: Callable[[Tensor], None]
    """Runs the model on one more token per beam (R,) and takes it back; other stages of the method see that forward
    and may leave in ``memory`` what they saw."""
    memory: dict[str, Any]


@dataclass(frozen=True)
class SearchStage:
    """Decode by a beam search that judges its candidates and can go back. ``generate`` uses it as its strategy."""

    judge: Callable[[SearchView], Tensor]
    """Returns new logits (R, V)."""
    read: Callable[[SearchView], None]
    """Called after the model has read the beams' newest tokens, to bring ``state`` up to date."""
    go_back: Callable[[SearchView], int | None]
    """Called after ``read``: how many tokens stay, fewer than t; the tokens that were chosen there are then forbidden.
    None goes on."""
    num_beams: int = 5
    """Used unless the caller of ``generate`` says otherwise."""


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


Stage = (
    TowerStage
    | TowerMergeStage
    | ProbeStage
    | PromptStage
    | LanguageStage
    | BiasStage
    | EditStage
    | HeadStage
    | LogitsStage
    | SearchStage
)


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
