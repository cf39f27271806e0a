"""Stages that change next-token logits or the search over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


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
