"""Massive activations: a few numbers of the residual stream that dwarf all others, and the model without them.

Source: Sun et al., "Massive Activations in Large Language Models", COLM 2024, arXiv 2402.17762;
github.com/locuslab/massive-activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vislm.errors import UsageError
from vislm.lmm.hooks import Hooks

LEAST, TIMES_MEDIAN = 100.0, 1000.0
"""An activation is massive when it is larger than this, and about so many times the median."""


@dataclass
class Activations:
    """The largest activations of a residual stream (B, T, D) behind one block."""

    top: Tensor
    """(B, n) signed values, the largest in magnitude first."""
    token: Tensor
    """(B, n) where they are: token,"""
    dim: Tensor
    """(B, n) and dimension."""
    median: Tensor
    """(B,): of all |x|."""

    @property
    def massive(self) -> Tensor:
        """(B, n) bool."""
        size = self.top.abs()
        return (size > LEAST) & (size > TIMES_MEDIAN * self.median[:, None])


def largest_activations(hidden: Tensor, valid: Tensor | None = None, top: int = 3) -> Activations:
    """Return the ``top`` largest |x| and the median |x| of hidden states (B, T, D), padding left out.

    Args:
        hidden: behind a block, after both residual additions.
        valid: (B, T) bool, False on padding.
        top: how many.
    """
    x = hidden.detach().float()
    size = x.abs()
    if valid is not None:
        size = size.masked_fill(~valid[..., None], torch.nan)
    found = size.nan_to_num(-1.0).flatten(1).topk(min(top, size[0].numel()), dim=-1)
    token, dim = found.indices // x.shape[-1], found.indices % x.shape[-1]
    return Activations(x.flatten(1).gather(1, found.indices), token, dim, size.flatten(1).nanmedian(-1).values)


@contextlib.contextmanager
def watch_blocks(blocks: Sequence[nn.Module], top: int = 3) -> Iterator[list[Activations]]:
    """Collect :func:`largest_activations` behind every block of one forward pass; hooks go when the context ends."""
    found: list[Activations] = []

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        found.append(largest_activations(_tensor(output), top=top))

    hooks = Hooks()
    try:
        for block in blocks:
            hooks.after(block, look)
        yield found
    finally:
        hooks.remove()


Place = tuple[int, int]
"""Token and dimension."""


@contextlib.contextmanager
def edited_activations(
    block: nn.Module, places: Sequence[Place], mode: Literal["set_zero", "set_mean"], means: Sequence[float] = ()
) -> Iterator[None]:
    """Set activations behind one block while the context is open.

    Args:
        block: the layer behind which the massive activations appear.
        places: (token, dimension) to set, in every forward of more than one token.
        mode: to zero, which destroys the model, or to their means over other inputs, which does not.
        means: one per place, for "set_mean".

    Raises:
        UsageError: an unknown mode, or not one mean per place.
    """
    if mode not in ("set_zero", "set_mean"):
        raise UsageError(f"{mode=}: expected 'set_zero' or 'set_mean'")
    if mode == "set_mean" and len(means) != len(places):
        raise UsageError(f"{len(means)} means for {len(places)} places; give one each")
    values = [0.0] * len(places) if mode == "set_zero" else list(means)

    def edit(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = _tensor(output)
        if hidden.shape[1] == 1:
            return output
        hidden = hidden.clone()
        for (token, dim), value in zip(places, values, strict=True):
            hidden[:, token, dim] = value
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = Hooks()
    try:
        hooks.after(block, edit)
        yield
    finally:
        hooks.remove()


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return (B,): the mean negative log-likelihood of ids (B, T) by logits (B, T, V), the logarithm of perplexity."""
    found = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    counted = torch.ones_like(found) if mask is None else (mask[:, 1:].bool() & mask[:, :-1].bool()).to(found.dtype)
    return -(found * counted).sum(-1) / counted.sum(-1).clamp(min=1.0)


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
