"""Stages that edit attention logits: a bias on all rows, or chosen rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vislm.lmm.decoder.attention import AttentionCall

if TYPE_CHECKING:
    from vislm.lmm.decoder.key_groups import KeyGroups


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
