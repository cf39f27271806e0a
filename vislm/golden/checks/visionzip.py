"""VisionZip's fixtures: a CLIP tower, the tokens it zips to, and which patches dominate."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vislm.golden.checks._encoding import encode
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, exact, relative
from vislm.lmm.choosing.ranking import top
from vislm.token_pruning.visionzip import VisionZip


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare the dominant patches, most attended first behind CLS, and all tokens in their order."""
    if "pixel_values" not in fixture.inputs:
        raise Unhandled(f"inputs {sorted(fixture.inputs)} belong to no known VisionZip fixture")
    dominant, contextual = fixture.kwargs["dominant"], fixture.kwargs["contextual"]
    encoded = encode(fixture, VisionZip(keep=dominant + contextual, contextual=contextual))
    if "dominant_indices_with_cls" in fixture.outputs:
        attention = [view.tower.signals["attention"][0, :, 0] for view, _ in encoded if view.tower is not None]
        order = torch.stack([torch.cat([torch.tensor([0]), 1 + top(a, dominant - 1)]) for a in attention])
        yield exact("dominant_indices_with_cls", order, fixture.outputs["dominant_indices_with_cls"])
    tokens = torch.stack([s.features for _, s in encoded if s.features is not None])
    yield relative("features", tokens, fixture.outputs["features"], 1e-3, 1e-4)
