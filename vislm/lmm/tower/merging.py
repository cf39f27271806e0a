"""Merging patches inside the vision tower, between attention and MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vislm.errors import PlanConflict
from vislm.kernels.matching import Matching
from vislm.lmm.choosing.tokens import gather_rows
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.hooks import Hooks, named_arguments
from vislm.lmm.interventions import ImageView, Selection, TowerMergeStage
from vislm.lmm.state import SessionState
from vislm.lmm.tower.pruning import put_back
from vislm.lmm.tower.record import TowerRecorder

HOME, SIZE = "tower_merge.home", "tower_merge.size"
"""Names of what is recorded per patch (K, N, 1): the patch that it was merged into, and how many stand there."""


@dataclass
class MergeState:
    """Which tokens of B images (or crops) are one by now: of P prefix tokens and N patches, n are left."""

    num_patches: int
    """N."""
    prefix: int
    """P."""
    source: Tensor
    """(B, P + N) place of the token that each is part of."""
    home: Tensor
    """(B, n) the token of a group that the others were merged into, 0 .. P + N - 1."""
    sizes: Tensor | None = None
    """(B, n) float32, how many tokens each stands for; None while nothing is merged."""
    lengths: list[int] = field(default_factory=list)
    """Patch tokens at the input of every layer."""
    mlp_lengths: list[int] = field(default_factory=list)
    """Patch tokens that run through every layer's MLP."""
    matching: Matching | None = None
    """What the layer in progress merges, and until the next one starts."""
    residual: Tensor | None = None
    """(B, n, C) tokens behind the attention of the layer in progress."""
    merged: Tensor | None = None
    """(B, n', C) the same tokens, merged."""
    read: Matching | None = None
    """What the layer that the language model reads has merged: its output still has a row for every token."""

    @property
    def index(self) -> Tensor:
        """(B, n) patches that merged tokens are at home at, ascending."""
        return self._patches().sort(dim=1).values

    def order(self) -> Tensor:
        """Return (B, n) the places of the patch tokens, sorted by their home."""
        return self._patches().argsort(dim=1)

    def records(self) -> dict[str, Tensor]:
        """Return what is recorded per patch, each (B, N, 1) in float32."""
        size = torch.zeros(self.source.shape, device=self.source.device)
        if self.sizes is not None:
            size.scatter_(1, self.home, self.sizes)
        home = self.home.gather(1, self.source)[:, self.prefix :] - self.prefix
        return {HOME: home.float().unsqueeze(-1), SIZE: size[:, self.prefix :].unsqueeze(-1)}

    def _patches(self) -> Tensor:
        return self.home[:, self.prefix :] - self.prefix


class TowerMergePart:
    """Hooks that merge tokens within a layer without touching its forward.

    The layer's second norm and MLP get merged tokens. The layer then adds its own, unmerged residual, so the hook of
    the MLP returns the merged result, copied to every member of its group, minus that residual: the layer's output has
    a row for each of its input tokens, and every row of a group is the merged token up to one rounding. The
    next layer's pre-hook keeps one row of each group, as does that of the projector. Behind it the rows are
    scattered into a full sequence, at the patches they are at home at, as for tokens that were dropped.
    """

    def __init__(
        self, shared: SessionState, stages: dict[int, tuple[int, TowerMergeStage]], recorder: TowerRecorder
    ) -> None:
        self.shared, self.stages = shared, {layer: stage for layer, (_, stage) in stages.items()}
        self.recorder = recorder
        self.prefix = shared.adapter.tower_prefix
        self.state: MergeState | None = None

    def install(self, hooks: Hooks) -> None:
        """Add the hooks and watch the attention of the layers that merge."""
        adapter = self.shared.adapter
        hooks.before(adapter.tower, self._start)
        first = min(self.stages)
        counts_sizes = any(stage.prop_attn for stage in self.stages.values())
        for number, (layer, attention) in enumerate(zip(adapter.tower_layers, adapter.tower_attentions, strict=True)):
            hooks.before(layer, lambda module, args, kwargs, n=number: self._before_layer(module, n, args, kwargs))
            if number in self.stages:
                norm, mlp = merge_points(layer)
                hooks.watch(attention, lambda call, out, n=number: self._match(call, out, n))
                hooks.before(norm, self._before_norm)
                hooks.after(mlp, lambda module, args, kwargs, out, n=number: self._after_mlp(out, n))
            if counts_sizes and number > first:
                hooks.bias(attention, lambda queries, keys: self._log_sizes())
        hooks.before(adapter.projector, self._before_projector)
        hooks.after(adapter.projector, self._after_projector)

    def _start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.state = None

    def _before_layer(self, module: nn.Module, number: int, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == 0:
            everyone = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
            self.state = MergeState(hidden.shape[1] - self.prefix, self.prefix, everyone, everyone)
        state = self.state
        assert state is not None
        before, state.matching = state.matching, None
        state.lengths.append(state.home.shape[1] - self.prefix)
        state.mlp_lengths.append(state.lengths[-1])
        if before is None:
            return None
        arguments = named_arguments(module, args, kwargs)
        del arguments["hidden_states"]
        return (gather_rows(hidden, before.kept),), arguments

    def _match(self, call: AttentionCall, out: Tensor, number: int) -> Tensor:
        if self.state is not None:
            matching = self.stages[number].match(call)
            self.state.matching = matching if matching.num_tokens < call.key.shape[2] else None
        return out

    def _log_sizes(self) -> Tensor | None:
        if self.state is None or self.state.sizes is None:
            return None
        return self.state.sizes.log()[:, None, None, :]

    def _before_norm(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        state = self.state
        if state is None or state.matching is None:
            return None
        state.residual = args[0]
        state.merged, state.sizes = state.matching.merge(args[0], state.sizes)
        return (state.merged,), kwargs

    def _after_mlp(self, out: Tensor, number: int) -> Tensor | None:
        state = self.state
        if state is None or state.matching is None:
            return None
        assert state.merged is not None
        assert state.residual is not None
        whole = state.matching.unmerge(state.merged + out) - state.residual
        state.source = state.matching.index.gather(1, state.source)
        state.home = state.home.gather(1, state.matching.kept)
        state.mlp_lengths[-1] = state.home.shape[1] - self.prefix
        state.residual = state.merged = None
        if number == self.shared.adapter.read_layer:
            state.read = state.matching
        return whole

    def _before_projector(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        state = self.state
        if state is None or state.sizes is None:
            return None
        features, order = args[0], state.order() + self.prefix
        places = order if state.read is None else state.read.kept.gather(1, order)
        tokens = state.home.shape[1] if state.read is None else state.read.index.shape[1]
        missing = tokens - features.shape[1]  # prefix tokens that the model has removed
        prefix = torch.arange(self.prefix - missing, device=order.device).expand(len(order), -1)
        for name, record in state.records().items():
            self.recorder.record(name, record)
        return (gather_rows(features, torch.cat([prefix, places - missing], 1)), *args[1:]), kwargs

    def _after_projector(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        state = self.state
        if state is None or state.sizes is None:
            return None
        return put_back(output, state.index, None, state.num_patches)


def merge_points(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return a tower layer's norm behind the attention, and its MLP.

    Raises:
        PlanConflict: a layer that is not as in CLIP and SigLIP.
    """
    names = ("layer_norm2", "mlp")
    if not all(isinstance(getattr(layer, name, None), nn.Module) for name in names):
        raise PlanConflict(
            f"tokens merge in vision layers with layer_norm2 and mlp (CLIP, SigLIP), and {type(layer).__name__} has no "
            "such parts; use a method that acts behind the tower"
        )
    return layer.get_submodule(names[0]), layer.get_submodule(names[1])


def with_tower_merges(selection: Selection, view: ImageView) -> Selection:
    """Return a selection of an image's n tokens with the sizes and sources that merging in the tower gave them.

    Tokens that a prompt stage merges again add up. A separator counts as one token. A token that the model pools from
    several patches counts the mean of what they stand for; then no patch has a token of its own, and sources are not
    known.
    """
    if view.tower is None or view.pack is None or HOME not in view.tower.signals:
        return selection
    home, sizes = view.tower.signals[HOME], view.pack(view.tower.signals[SIZE], 1.0)[:, 0]
    crops, patches = home.shape[:2]
    chosen = selection.source
    if chosen is None:
        chosen = torch.where(selection.keep, selection.keep.cumsum(0) - 1, -1)
    chosen = chosen.to(home.device)
    counted = (chosen >= 0) & (sizes > 0)
    total = torch.zeros(int(selection.keep.sum()), device=home.device).index_add(0, chosen[counted], sizes[counted])
    everyone = torch.arange(crops * patches, device=home.device).view(crops, patches)
    own = _packed_numbers(view.pack, everyone)
    went = _packed_numbers(view.pack, home[..., 0].long() + everyone[:, :1])
    if own is None or went is None:
        return replace(selection, size=total)
    token = torch.arange(len(own), device=home.device)
    token_of = torch.full((crops * patches,), -1, device=home.device)
    token_of[own[own >= 0]] = token[own >= 0]
    became = torch.where(own >= 0, token_of[went.clamp(min=0)], token)
    source = torch.where(became >= 0, chosen[became.clamp(min=0)], -1)
    return replace(selection, size=total, source=source)


def _packed_numbers(pack: Callable[[Tensor, float], Tensor], numbers: Tensor) -> Tensor | None:
    """Return whole numbers (K, N) in the order of an image's tokens (n,), -1 for separators; None if they get mixed."""
    bits = numbers[..., None] >> torch.arange(24, device=numbers.device) & 1
    found = pack(bits.float(), -1.0)
    if not bool(((found == 0) | (found == 1) | (found == -1)).all()):
        return None
    separator = (found == -1).all(-1)
    return (found.long() << torch.arange(24, device=found.device)).sum(-1).masked_fill(separator, -1)
