"""The attention analysis: sink rate and entropies, a ViT's head profile and rollout, knockout masks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vislm.analysis import entropy, sinks
from vislm.analysis.distance import HeadProfile, head_profile, mean_profile
from vislm.analysis.knockout import cross_frame_pairs, frame_spans, knockout_mask
from vislm.analysis.rollout import Rollout
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, difference, exact

TOLERANCE = 1e-5


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Tell the kinds apart by what they hold."""
    if "grid" in fixture.kwargs:
        yield from _profile(fixture)
    elif "num_frames" in fixture.kwargs:
        yield from _knockout(fixture)
    elif "epsilon" in fixture.kwargs or "row_entropy_threshold" in fixture.kwargs:
        yield from _sinks(fixture)
    else:
        raise Unhandled(f"options {sorted(fixture.kwargs)} belong to no known fixture of the attention analysis")


def _profile(fixture: Fixture) -> Iterator[Comparison]:
    attention, options = fixture.inputs["attention"], fixture.kwargs
    height, width = options["grid"]
    prefix = options["prefix_tokens"]
    profiles = [_averaged(layer, (height, width), prefix) for layer in attention]
    for name in ("mean_distance", "hop_strength", "patch_entropy", "self_attention", "prefix_mass"):
        if name in fixture.outputs:
            ours = torch.stack([getattr(profile, name) for profile in profiles])
            yield difference(name, ours, fixture.outputs[name], TOLERANCE)
    if "rollout" in fixture.outputs:
        rollout = Rollout(residual=options.get("rollout_residual", 0.5))
        expected = fixture.outputs["rollout"]
        yield difference("rollout", rollout.matrix(list(attention)), expected, TOLERANCE)
        yield difference("rollout, first row alone", rollout.row(list(attention), 0), expected[:, 0], TOLERANCE)


def _averaged(layer: Tensor, grid: tuple[int, int], prefix: int) -> HeadProfile:
    """Return one profile of all images, each taken alone."""
    return mean_profile([(1, head_profile(image[None], grid, prefix)) for image in layer])


def _sinks(fixture: Fixture) -> Iterator[Comparison]:
    attention, options, out = fixture.inputs["attention"], fixture.kwargs, fixture.outputs
    if "sink_rate_percent" in out:
        rate = sinks.sink_rate(sinks.importance_of(attention), options.get("epsilon", sinks.EPSILON))
        yield difference("sink_rate_percent", rate, out["sink_rate_percent"], 1e-4)
    first = attention[0]
    found = entropy.head_entropy(first)
    for name, ours in (
        ("row_entropy", found.rows),
        ("column_entropy", found.columns),
        ("row_entropy_head_mean", found.row_mean),
        ("column_entropy_head_max", found.column_max),
    ):
        if name in out:
            yield difference(name, ours, out[name], TOLERANCE)
    if "row_entropy_threshold" not in options:
        return
    heads = found.dormant(options["row_entropy_threshold"], options["column_entropy_threshold"])
    for name, ours in (
        ("zeroed_by_entropy", entropy.zeroed(first, heads)),
        ("moved_to_first_by_entropy", entropy.moved_to_first(first, heads)),
    ):
        if name in out:
            yield difference(name, ours, out[name], TOLERANCE)


def _knockout(fixture: Fixture) -> Iterator[Comparison]:
    options, out = fixture.kwargs, fixture.outputs
    tokens, start = options["num_tokens"], options["vision_start"]
    frames = frame_spans(start, options["num_frames"], options["tokens_per_frame"])
    last = [((tokens - 1,), range(start, frames[-1][1]))]
    masks = {
        "mask_cross_frame": knockout_mask(tokens, cross_frame_pairs(frames)),
        "mask_vision_to_last": knockout_mask(tokens, last),
        "mask_keep_only": knockout_mask(tokens, last, opposite=True),
    }
    known = [name for name in masks if name in out]
    if not known:
        raise Unhandled(f"outputs {sorted(out)} belong to no known knockout mask")
    for name in known:
        yield exact(name, masks[name].to(out[name].dtype).expand_as(out[name]), out[name])
