"""Stages inside the vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vislm.kernels.matching import Matching
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions.counting import Expected, Positions


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
