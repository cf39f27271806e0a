"""Dropping patches inside the vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vislm.lmm.choosing.tokens import compact, gather_rows
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.interventions import TowerStage, TowerView
from vislm.lmm.state import SessionState


@dataclass
class TowerState:
    """Which patches of B images are alive during one encoding."""

    num_patches: int
    index: Tensor
    """(B, n) indices into the full patch grid, ascending."""
    valid: Tensor | None = None
    """(B, n) bool, False on padding; None when nothing is padding."""
    lengths: list[int] = field(default_factory=list)
    """Patch tokens at the input of every layer (the longest image)."""
    steps: list[tuple[int, Tensor, Tensor | None]] = field(default_factory=list)
    """(layer, index, valid) from every layer on whose input was shortened."""
    signal: Any = None


class TowerPart:
    """Hooks that shorten the tower's hidden states between layers and put the survivors back in their places.

    A pre-hook of layer l + 1 drops what a stage rejects after layer l: hidden states that transformers records for
    layer l keep their full length. The projector runs on the survivors only; behind it they are scattered into a full
    sequence whose dropped rows are NaN, so that the model's own tiling and newline logic sees the lengths it expects.
    The prompt part removes those rows; should anything else read one, it fails loudly.
    """

    def __init__(self, shared: SessionState, stages: dict[int, tuple[int, TowerStage]]) -> None:
        self.shared, self.stages = shared, stages
        self.prefix = shared.adapter.tower_prefix
        self.state: TowerState | None = None

    def install(self, hooks: Hooks) -> None:
        """Add the hooks and watch the attention of the layers whose signals are needed."""
        adapter = self.shared.adapter
        layers = adapter.tower_layers
        hooks.before(adapter.tower, self._start)
        for number, layer in enumerate(layers):
            hooks.before(layer, lambda module, args, kwargs, n=number: self._before_layer(module, n, args, kwargs))
        for number in self.stages:
            hooks.watch(adapter.tower_attentions[number], lambda call, out, n=number: self._signal(call, out, n))
        hooks.after(adapter.projector, self._scatter)

    def _start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.state = None
        for owner, _ in self.stages.values():  # images and videos are encoded one after the other
            self.shared.run.memory[owner].clear()

    def _signal(self, call: AttentionCall, out: Tensor, layer: int) -> Tensor:
        if self.state is not None:
            self.state.signal = self.stages[layer][1].signal(call)
        return out

    def _before_layer(self, module: nn.Module, number: int, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == 0:
            images, tokens = hidden.shape[0], hidden.shape[1] - self.prefix
            index = torch.arange(tokens, device=hidden.device).expand(images, tokens)
            self.state = TowerState(tokens, index)
        state = self.state
        assert state is not None
        shorter = self._drop(number - 1, hidden, state)
        state.lengths.append(state.index.shape[1])
        if shorter is None and state.valid is None:
            return None
        arguments = named_arguments(module, args, kwargs)
        if state.valid is not None:
            prefix = state.valid.new_ones(state.valid.shape[0], self.prefix)
            arguments["attention_mask"] = torch.cat([prefix, state.valid], 1)[:, None, None, :]
        arguments.pop("hidden_states", None)
        return (hidden if shorter is None else shorter,), arguments

    def _drop(self, layer: int, hidden: Tensor, state: TowerState) -> Tensor | None:
        if layer not in self.stages:
            return None
        owner, stage = self.stages[layer]
        memory = self.shared.run.memory[owner]
        view = TowerView(state.signal, layer, state.valid, state.num_patches, memory)
        keep = stage.select(view)
        if keep is None or bool(keep.all()):
            return None
        index, valid = compact(keep, pad="right")
        stage.kept(memory, index)
        state.index, state.valid = state.index.gather(1, index), valid
        state.steps.append((layer + 1, state.index, valid))
        prefix = hidden[:, : self.prefix]
        return torch.cat([prefix, gather_rows(hidden[:, self.prefix :], index)], 1)

    def _scatter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        state = self.state
        if state is None or state.index.shape[1] == state.num_patches:
            return None
        return put_back(output, state.index, state.valid, state.num_patches)


def put_back(output: Tensor, index: Tensor, valid: Tensor | None, num_patches: int) -> Tensor:
    """Return (B, P + N, C) with the tokens (B, P + n, C) of N patches at their places and NaN in all other rows.

    Args:
        output: P prefix tokens, where the model keeps them, then n patches.
        index: (B, n) the patches' places.
        valid: (B, n) bool, False on padding; None when nothing is padding.
        num_patches: N.
    """
    prefix = output.shape[1] - index.shape[1]
    full = output.new_full((output.shape[0], prefix + num_patches, output.shape[2]), torch.nan)
    full[:, :prefix] = output[:, :prefix]
    index, survivors = index + prefix, output[:, prefix:]
    if valid is not None:
        row = torch.arange(len(index), device=index.device).unsqueeze(1).expand_as(index)
        full[row[valid], index[valid]] = survivors[valid]
    else:
        full.scatter_(1, index.unsqueeze(-1).expand_as(survivors), survivors)
    return full


def mix_survivors(method: Callable[..., Any], features: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a model's method that mixes neighbouring patches such that patches that were dropped have no share.

    Args:
        method: takes features (list of (K, N, C), or (K, N, C)) and ``image_newline``; returns new features, or a list
            of them and their lengths. Every new token is a weighted mean of old ones.
        features: NaN in rows that were dropped.
        args: further arguments.
        kwargs: further arguments.

    Returns:
        What the method returns: each token the mean of the survivors among its patches, NaN where there is none.
    """
    single = isinstance(features, Tensor)
    parts = [features] if single else list(features)
    dropped = [part.isnan().all(-1, keepdim=True) for part in parts]
    if not any(bool(gone.any()) for gone in dropped):
        return method(features, *args, **kwargs)
    zeroed = [part.masked_fill(gone, 0.0) for part, gone in zip(parts, dropped, strict=True)]
    alive = [(~gone).to(part.dtype) for part, gone in zip(parts, dropped, strict=True)]
    if single:
        return _divide(method(zeroed[0], *args, **kwargs), method(alive[0], *args, **kwargs))
    tokens, lengths = method(zeroed, *args, **kwargs)
    shares, _ = method(alive, *args, **{**kwargs, "image_newline": alive[0].new_ones(1)})
    return [_divide(own, share) for own, share in zip(tokens, shares, strict=True)], lengths


def _divide(tokens: Tensor, share: Tensor) -> Tensor:
    return (tokens / share).masked_fill(share < 1e-6, torch.nan)
