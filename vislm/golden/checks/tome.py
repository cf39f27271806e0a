"""ToMe's fixtures: the matching with everything that merges by it, and whole vision transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vislm.golden.checks._complete import compared
from vislm.golden.fixtures import Comparison, Fixture, Skipped, Unhandled, exact, relative
from vislm.kernels.matching import bipartite_soft_matching
from vislm.token_pruning.tome.schedule import merge_schedule
from vislm.token_pruning.tome.vit import merging

OWN_OPTIONS = ("r", "r_is_tuple", "prop_attn", "r_schedule", "trace_source")
"""Options of ToMe among those of the model."""


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Tell the kinds apart by the tensors that they hold."""
    if "metric" in fixture.inputs:
        yield from compared(fixture, _functions(fixture))
    elif "image" in fixture.inputs:
        yield from compared(fixture, _model(fixture))
    else:
        raise Unhandled(f"inputs {sorted(fixture.inputs)} belong to no known ToMe fixture")


def _functions(fixture: Fixture) -> Iterator[Comparison]:
    options, out = fixture.kwargs, fixture.outputs
    protected = {name: options.get(name, False) for name in ("class_token", "distill_token")}
    matching = bipartite_soft_matching(fixture.inputs["metric"], options["r"], **protected)
    tokens, sizes = fixture.inputs["x"], fixture.inputs.get("size")
    merged = matching.merge(tokens, None if sizes is None else sizes[..., 0])
    results = {
        "merged_x": merged.tokens,
        "merged_size": merged.sizes.unsqueeze(-1),
        "unmerged_x": matching.unmerge(merged.tokens),
        "merge_sum": matching.merge(tokens, reduce="sum").tokens,
        "merge_mean": matching.merge(tokens).tokens,
        "merge_amax": matching.merge(tokens, reduce="amax").tokens,
    }
    for name in results.keys() & out.keys():
        yield relative(name, results[name], out[name], 1e-5, 1e-5)
    if "source" in out:
        yield exact("source", matching.source(), out["source"])


def _model(fixture: Fixture) -> Iterator[Comparison]:
    """The official code pools the merged tokens by their plain mean where the model takes a mean."""
    options, out = fixture.kwargs, fixture.outputs
    model = _model_class(fixture.class_or_function)(**{k: v for k, v in options.items() if k not in OWN_OPTIONS})
    model.eval().load_state_dict(fixture.params)
    r: Any = tuple(options["r"]) if options.get("r_is_tuple") else options["r"]
    if "r_schedule" in options:
        yield exact("r_schedule", merge_schedule(r, options["depth"]), options["r_schedule"])
    with torch.no_grad(), merging(model, r, prop_attn=options.get("prop_attn", True), weighted_pool=False) as merges:
        logits = model(fixture.inputs["image"])
    yield relative("logits", logits, out["logits"], 1e-4, 1e-4)
    if "size" in out:
        yield exact("size", merges.sizes.unsqueeze(-1), out["size"])
    if "source" in out:
        yield exact("source", merges.source_matrix(), out["source"])


def _model_class(official: str) -> Any:
    name = official.partition("(")[2].rstrip(")")
    if name == "VisionTransformer":
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer
    if name == "VisionTransformerDistilled":
        from timm.models.deit import VisionTransformerDistilled

        return VisionTransformerDistilled
    raise Unhandled(f"no model for {official!r}")
