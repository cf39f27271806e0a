"""What one call of a vision tower costs, whole and as it was thinned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vislm.lmm.adapters import Adapter
from vislm.lmm.tower.merging import MergeState
from vislm.lmm.tower.packed import PackedState
from vislm.lmm.tower.pruning import TowerState


def tower_flops(
    adapter: Adapter, arguments: Mapping[str, Any], state: TowerState | PackedState | MergeState | None
) -> dict[str, int]:
    """Return the FLOPs of a call, projector included: "tower" as it ran, "full_tower" without any method.

    Args:
        adapter: of the model.
        arguments: of the tower's forward.
        state: what the part that thins the tower has left of this call; None if none does.
    """
    shape, segments = adapter.tower_shape, adapter.tower_segments(arguments)
    crops, patches = len(segments[0]), sum(segments[0]) - len(segments[0]) * shape.prefix
    full = shape.batch_flops(segments, patches, patches // shape.cell)
    if state is None:
        spent = full
    elif isinstance(state, PackedState):
        spent = shape.batch_flops(state.segments, patches, sum(len(index) for index in state.index) // shape.cell)
    else:
        mlp = state.mlp_lengths if isinstance(state, MergeState) else state.lengths
        spent = shape.batch_flops(
            [[n + shape.prefix] * crops for n in state.lengths],
            patches,
            crops * state.index.shape[1] // shape.cell,
            [(n + shape.prefix) * crops for n in mlp],
        )
    return {"tower": spent, "full_tower": full}
