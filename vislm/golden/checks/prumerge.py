"""PruMerge's fixtures: a CLIP tower and the tokens that it is merged into."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vislm.golden.checks._encoding import encode
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, difference, exact, relative
from vislm.lmm.interventions import Selection
from vislm.token_pruning.prumerge import PruMerge


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Compare the adaptive ratio, the kept patches in their order, and all tokens, the extra one last."""
    if "pixel_values" not in fixture.inputs:
        raise Unhandled(f"inputs {sorted(fixture.inputs)} belong to no known PruMerge fixture")
    adaptive = fixture.kwargs.get("if_adaptive", True)
    method = PruMerge(
        plus=fixture.class_or_function.endswith("_plus"),
        reduction_ratio=None if adaptive else fixture.kwargs["reduction_ratio"],
        shared_ratio=adaptive,
        attention_order=True,
    )
    encoded = encode(fixture, method)
    view = encoded[0][0]
    if "adaptive_ratio" in fixture.outputs and adaptive and view.tower is not None:
        ratio = view.tower.signals["ratio"][0]
        yield difference("adaptive_ratio", ratio, fixture.outputs["adaptive_ratio"], 1e-12)
    if "kept_indices" in fixture.outputs:
        kept = torch.stack([_kept(selection) for _, selection in encoded])
        yield exact("kept_indices", kept, fixture.outputs["kept_indices"])
    tokens = torch.stack([s.features for _, s in encoded if s.features is not None])
    yield relative("features", tokens, fixture.outputs["features"], 1e-3, 1e-4)


def _kept(selection: Selection) -> Tensor:
    """Return the patches that have a token of their own, in the order of the tokens; the last token is the extra."""
    assert selection.source is not None
    extra = int(selection.keep.sum()) - 1
    own = ((selection.source >= 0) & (selection.source < extra)).nonzero().squeeze(1)
    return own[selection.source[own].argsort()]
