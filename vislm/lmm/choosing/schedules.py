"""Published pruning schedules, brought to models of other depths, images of other sizes and other budgets.

The papers publish layers of a 32-layer language model and token counts of a 576-token image (LLaVA-1.5-7B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vislm.errors import PlanConflict, UsageError

DEPTH = 32
"""Decoder layers of LLaVA-1.5-7B."""
TOKENS = 576
"""Visual tokens of a LLaVA-1.5 image."""


def scaled_layers(published: Sequence[int], depth: int, first: int, last: int) -> dict[int, int]:
    """Return layer -> stage number for a model of ``depth`` layers, each layer moved to the same share of the depth.

    Layers stay within [first, last]; of stages that fall on one layer the latest (the one that keeps least) remains.
    """
    return {min(max(round(n * depth / DEPTH), first), last): stage for stage, n in enumerate(published)}


def check_layers(name: str, layers: Sequence[int], stages: int) -> None:
    """Raise ``UsageError`` unless ``layers`` are ascending, from 0, and as many as there are stages."""
    if len(layers) != stages or list(layers) != sorted(set(layers)) or min(layers, default=-1) < 0:
        raise UsageError(f"{name}: layers={tuple(layers)}: expected {stages} ascending layers, one for each stage")


def attention_layers(
    name: str, published: Sequence[int], layers: Sequence[int] | None, counts: Sequence[int] | None, depth: int
) -> dict[int, int]:
    """Return layer -> stage number for stages that rank by one layer's attention and act behind it.

    Args:
        name: the method's, for messages.
        published: the layers of a 32-layer model.
        layers: the caller's own layers, or None.
        counts: the caller's own tokens at each stage, or None.
        depth: decoder layers of the model.

    Raises:
        UsageError: layers that are not ascending, counts that are not positive, more of one than of the other.
        PlanConflict: a model of a single layer.
    """
    stages = len(published) if counts is None else len(counts)
    if counts is not None and (not stages or min(counts) < 1):
        raise UsageError(f"{name}: counts={tuple(counts)}: expected at least 1 token at each stage")
    if layers is not None:
        check_layers(name, layers, stages)
        return {layer: stage for stage, layer in enumerate(layers)}
    if stages != len(published):
        raise UsageError(
            f"{name}: {stages} counts need layers= as well, one for each; the default has {len(published)}"
        )
    if depth < 2:
        raise PlanConflict(f"{name} acts between decoder layers; the model has {depth}")
    return scaled_layers(published, depth, 0, depth - 2)


def stage_counts(published: Mapping[int, Sequence[int]], keep: int | float, tokens: int) -> list[int]:
    """Return the tokens of an image that stay at each stage, for a budget between the published ones.

    The budget is expressed for a 576-token image, interpolated linearly between its published neighbours (and between
    the largest one and 576, where all stay; below the smallest one, counts shrink in proportion), and the counts are
    scaled back to ``tokens``. Published budgets on 576 tokens give the published counts; ``keep`` = all keeps all.

    Args:
        published: budget -> tokens at each stage, for 576 tokens.
        keep: the budget in tokens, or a ratio in (0, 1].
        tokens: visual tokens of the image.
    """
    budget = keep * TOKENS if isinstance(keep, float) else min(keep / tokens, 1.0) * TOKENS
    stages = len(next(iter(published.values())))
    table = {0: [0] * stages, **published, TOKENS: [TOKENS] * stages}
    upper = min(b for b in table if b >= budget)
    lower = max(b for b in table if b < budget)
    share = (budget - lower) / (upper - lower)
    counts = (low + share * (high - low) for low, high in zip(table[lower], table[upper], strict=True))
    return [min(tokens, max(1, round(count * tokens / TOKENS))) for count in counts]


def keep_for_average(average: float, tokens: int, layer: int, depth: int) -> int:
    """Return how many tokens must stay behind decoder layer ``layer - 1`` for ``average`` tokens over all layers.

    Layers 0 .. ``layer`` - 1 process all ``tokens``: rank = (depth average - layer tokens) / (depth - layer), rounded.

    Raises:
        UsageError: less than one token would be left.
    """
    rank = round((depth * average - layer * tokens) / (depth - layer))
    if rank < 1:
        least = (layer * tokens + depth - layer) / depth
        raise UsageError(
            f"an average of {average:g} tokens over {depth} layers cannot be had when the first {layer} of them "
            f"process all {tokens}: the least is {least:.1f}; ask for more, or prune at an earlier layer"
        )
    return min(rank, tokens)


def ratio_for_average(share: float, layers: Sequence[int], depth: int) -> float:
    """Return the ratio r for which keeping 1, r, r^2, ... of the tokens between ``layers`` averages to ``share``.

    Args:
        share: mean share of the tokens over all layers, in (0, 1].
        layers: the stages: stage i acts before decoder layer ``layers[i]``.
        depth: decoder layers.

    Raises:
        UsageError: the layers before the first stage alone exceed the share.
    """
    spans = [end - start for start, end in zip([0, *layers], [*layers, depth], strict=True)]

    def mean(ratio: float) -> float:
        return sum(span * ratio**stage for stage, span in enumerate(spans)) / depth

    if share <= mean(0.0):
        raise UsageError(
            f"an average of {share:.1%} of the tokens cannot be had when the first {layers[0]} of {depth} layers "
            f"process all of them ({mean(0.0):.1%}); ask for more, or give earlier layers"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < share else (low, middle)
    return high
