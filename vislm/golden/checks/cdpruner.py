"""CDPruner's fixtures: which patches of a batch the conditional DPP keeps."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vislm.golden.fixtures import Comparison, Fixture, exact
from vislm.token_pruning import cdpruner


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare the masks; the official range of the relevance is that of the whole batch."""
    tokens, patches = fixture.inputs["projected_features"], fixture.inputs["clip_image_embeds"]
    r = cdpruner.relevance(patches, fixture.inputs["clip_text_embeds"])
    weight = cdpruner.to_unit_range(r, shared=True)
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    for row, (features, w) in enumerate(zip(tokens, weight, strict=True)):
        kernel = cdpruner.conditional_kernel(features, w)
        mask[row, cdpruner.greedy_map(kernel, fixture.kwargs["visual_token_num"])] = True
    yield exact("keep_mask", mask, fixture.outputs["keep_mask"])
