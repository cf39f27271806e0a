"""Uniform pruning: keep evenly spaced patches, the baseline that sees everything a little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.tokens import check_keep, token_count
from vislm.lmm.interventions import ImageView, Positions, PromptStage


def spread(count: int, total: int) -> Tensor:
    """Return ``count`` whole numbers in [0, total), evenly spaced and centred."""
    return ((torch.arange(count) + 0.5) * total / count).floor().long()


def spread_on_grid(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return rows and columns (count,) of evenly spaced cells; the rows carry equal numbers of them, up to one."""
    rows = max(1, min(height, round((count * height / width) ** 0.5), count))
    while -(-count // rows) > width:
        rows += 1
    shares = torch.diff((torch.arange(rows + 1) * count) // rows).tolist()
    y = torch.repeat_interleave(spread(rows, height), torch.tensor(shares))
    return y, torch.cat([spread(n, width) for n in shares])


def _shares(count: int, sizes: list[int]) -> list[int]:
    """Split ``count`` in proportion to sizes, by largest remainder."""
    exact = [count * size / sum(sizes) for size in sizes]
    shares = [int(x) for x in exact]
    order = sorted(range(len(sizes)), key=lambda i: shares[i] - exact[i])
    for i in order[: count - sum(shares)]:
        shares[i] += 1
    return shares


@dataclass(frozen=True)
class UniformPruning:
    """Keep an evenly spaced subset of every image's patch tokens; a tiled image's views share by their size."""

    keep: int | float = 64
    """Visual tokens per image, or a ratio of them."""
    positions: Positions = "original"
    calibrate: bool = False
    """Add RESTORE's logit calibration (``vislm.lmm.decoder.calibration``)."""
    name = "uniform"

    def plan(self, adapter: Adapter) -> Sequence[PromptStage]:
        """Return one stage before the language model."""
        check_keep(self.keep)
        select = partial(self._select, adapter)
        return [PromptStage(select, self.positions, expected=lambda alive: alive.after(self.keep))]

    def _select(self, adapter: Adapter, view: ImageView) -> Tensor:
        candidates = view.candidates.nonzero().flatten()
        count = token_count(self.keep, len(candidates))
        keep = torch.zeros_like(view.candidates)
        grids = adapter.grids(view.features, view.span)
        if sum(g.height * g.width for g in grids) != len(candidates):  # a tower has thinned the grid before
            keep[candidates[spread(count, len(candidates)).to(candidates.device)]] = True
            return keep
        for grid, share in zip(grids, _shares(count, [g.height * g.width for g in grids]), strict=True):
            if share:
                rows, columns = spread_on_grid(share, grid.height, grid.width)
                keep[(grid.start + rows * grid.row_stride + columns).to(keep.device)] = True
        return keep


METHOD = UniformPruning
