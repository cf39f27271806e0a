"""Dropping patches in towers that pack all images into one sequence (Qwen2-VL)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vislm.errors import UsageError
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.hooks import Hooks
from vislm.lmm.interventions import TowerStage, TowerView


@dataclass
class PackedState:
    """Which patches of each image are alive during one encoding."""

    patches: list[int]
    """Patches of the full images (of a video: of every frame)."""
    index: list[Tensor]
    """Per image (n,): indices into its own patches, ascending."""
    memory: list[dict[str, Any]]
    signals: list[Any] = field(default_factory=list)
    """One per image, in the order in which the attention meets them."""
    segments: list[list[int]] = field(default_factory=list)
    """Patches of every image that entered each block."""
    steps: list[list[Tensor]] = field(default_factory=list)
    """Per pruning step and image: indices into the patches that were alive."""

    @property
    def tokens(self) -> list[int]:
        """Patches that entered each block, all images together."""
        return [sum(block) for block in self.segments]

    @property
    def lengths(self) -> list[int]:
        """Patches that entered each block (the longest image)."""
        return [max(block) for block in self.segments]

    def rows(self) -> Tensor:
        """Return the surviving rows (n,) of the full packed sequence."""
        starts = torch.tensor([0, *self.patches[:-1]]).cumsum(0).tolist()
        return torch.cat([index + start for index, start in zip(self.index, starts, strict=True)])


class PackedTowerPart:
    """Hooks that shorten the packed sequence between blocks, image by image.

    The tower's loop passes the full sequence's segment bounds and rotary embedding to every block; the hooks replace
    both by those of the survivors. A stage after the last block acts in front of the merger.
    """

    def __init__(self, tower: nn.Module, stages: dict[int, TowerStage], cell: int | None = None) -> None:
        """Take the tower and the stages after its blocks.

        Args:
            tower: Qwen2-VL's.
            stages: block -> stage after it.
            cell: patches that the merger joins, to put the merged tokens back among rows of NaN, as the model's own
                code expects a token for every cell; None leaves the merger's output short.
        """
        self.tower, self.stages, self.cell = tower, stages, cell
        self.blocks = list(tower.get_submodule("blocks").children())
        self.state: PackedState | None = None

    def install(self, hooks: Hooks) -> None:
        """Add the hooks and watch the attention of the blocks whose signals are needed."""
        hooks.before(self.tower, self._start)
        for number, block in enumerate(self.blocks):
            hooks.before(block, lambda module, args, kwargs, n=number: self._before_block(n, args, kwargs))
            if number in self.stages:
                hooks.watch(block.get_submodule("attn"), lambda call, out, n=number: self._signal(n, call, out))
        hooks.before(self.tower.get_submodule("merger"), self._before_merger)
        if self.cell is not None:
            hooks.after(self.tower.get_submodule("merger"), self._after_merger)

    def _start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.state = None

    def _signal(self, number: int, call: AttentionCall, out: Tensor) -> Tensor:
        assert self.state is not None
        self.state.signals.append(self.stages[number].signal(call))
        return out

    def _before_block(self, number: int, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == 0:
            lengths = kwargs["cu_seqlens"].diff().tolist()
            index = [torch.arange(n, device=hidden.device) for n in lengths]
            self.state = PackedState(lengths, index, [{} for _ in lengths])
        state = self.state
        assert state is not None
        hidden = self._drop(number - 1, hidden)
        state.segments.append([len(index) for index in state.index])
        if hidden.shape[0] == sum(state.patches):
            return None
        rows = state.rows()
        counts = torch.tensor([0, *(len(i) for i in state.index)], device=hidden.device)
        kwargs = dict(kwargs)
        kwargs.pop("hidden_states", None)
        kwargs["cu_seqlens"] = counts.cumsum(0).to(kwargs["cu_seqlens"].dtype)
        kwargs["max_seqlen"] = int(counts.max())
        kwargs["position_embeddings"] = tuple(part[rows] for part in kwargs["position_embeddings"])
        return (hidden,), kwargs

    def _before_merger(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        return (self._drop(len(self.blocks) - 1, args[0]), *args[1:]), kwargs

    def _after_merger(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        state, cell = self.state, self.cell
        assert state is not None
        assert cell is not None
        seats = torch.cat([s + start for s, start in zip(self._seats(state, cell), _starts(state, cell), strict=True)])
        full = output.new_full((sum(state.patches) // cell, output.shape[1]), torch.nan)
        full[seats] = output
        return full

    @staticmethod
    def _seats(state: PackedState, cell: int) -> list[Tensor]:
        """Return the cells (m,) of each image that its merged tokens stand for.

        Survivors that are no whole cells are joined as they come: they take the image's first seats.
        """
        seats = []
        for index in state.index:
            if len(index) % cell:
                raise UsageError(f"{len(index)} patches of an image are left, but the merger joins {cell} to one token")
            cells = index.unflatten(0, (-1, cell)) // cell
            whole = bool((cells == cells[:, :1]).all())
            seats.append(cells[:, 0] if whole else torch.arange(len(cells), device=index.device))
        return seats

    def _drop(self, number: int, hidden: Tensor) -> Tensor:
        state = self.state
        if number not in self.stages or state is None:
            return hidden
        stage, chosen = self.stages[number], []
        for image, signal in enumerate(state.signals):
            memory = state.memory[image]
            keep = stage.select(TowerView(signal, number, None, state.patches[image], memory))
            local = torch.arange(len(state.index[image]), device=hidden.device)
            if keep is not None:
                local = local[keep[0]]
                stage.kept(memory, local.unsqueeze(0))
            chosen.append(local)
        state.signals.clear()
        if all(len(local) == len(index) for local, index in zip(chosen, state.index, strict=True)):
            return hidden
        state.steps.append(chosen)
        starts = torch.tensor([0, *(len(i) for i in state.index[:-1])]).cumsum(0).tolist()
        rows = torch.cat([local + start for local, start in zip(chosen, starts, strict=True)])
        state.index = [index[local] for index, local in zip(state.index, chosen, strict=True)]
        return hidden[rows]


def _starts(state: PackedState, cell: int) -> list[int]:
    """Return the first cell of each image in the packed sequence."""
    return torch.tensor([0, *state.patches[:-1]]).cumsum(0).div(cell, rounding_mode="floor").tolist()
