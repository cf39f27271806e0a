"""VisPruner's fixtures: which tokens stay, for given attention and features."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vislm.golden.fixtures import Comparison, Fixture, Unhandled, exact
from vislm.token_pruning.vispruner import choose


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare the mask of kept tokens, image by image."""
    if not {"cls_attention_per_head", "features"} <= fixture.inputs.keys():
        raise Unhandled(f"inputs {sorted(fixture.inputs)} belong to no known VisPruner fixture")
    attention = fixture.inputs["cls_attention_per_head"].float().mean(1)
    keep, ratio = fixture.kwargs["visual_token_num"], fixture.kwargs.get("important_ratio", 0.5)
    rows = zip(attention, fixture.inputs["features"], strict=True)
    masks = torch.stack([choose(a, f, keep, ratio) for a, f in rows])
    yield exact("keep_mask", masks, fixture.outputs["keep_mask"])
