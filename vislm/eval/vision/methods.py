"""Token reduction in vision models without a language model: ToMe in plain transformers of timm and open_clip."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from vislm import registry
from vislm.backbones.replacing_towers import tower_of
from vislm.errors import UsageError
from vislm.lmm.choosing.tokens import check_keep, token_count
from vislm.token_pruning.tome import DEFAULT_KEEP, Merging, ToMe, merging
from vislm.token_pruning.tome.schedule import schedule_to_keep


@contextlib.contextmanager
def reduced(
    model: nn.Module, prune: Sequence[str], heads: Sequence[str], patches: int | None
) -> Iterator[tuple[Merging | None, list[str]]]:
    """Merge tokens in a vision transformer while the context is open; yield the handle and the methods in words.

    Args:
        model: of timm or open_clip.
        prune: nothing, or one ``tome:option=value,...``.
        heads: nothing.
        patches: of a picture, which ``keep`` counts; None: unknown.

    Raises:
        UsageError: a method that needs a language model, an option that only concerns one, a model that is no plain
            vision transformer.
    """
    if heads:
        raise UsageError(f"--heads {heads[0]} acts in a language model; this benchmark evaluates a vision model alone")
    if not prune:
        yield None, []
        return
    methods = [registry.build("pruning", spec) for spec in prune]
    method = methods[0]
    if len(methods) > 1 or not isinstance(method, ToMe):
        raise UsageError(
            f"--prune {' '.join(prune)}: in a vision model without a language model only tome merges tokens, once; "
            "the other methods choose the tokens that a language model gets"
        )
    if method.positions != ToMe.positions or method.calibrate:
        raise UsageError(f"--prune {prune[0]}: positions and calibrate concern a language model; leave them out")
    with merging(model, schedule(method, len(tower_of(model).blocks), patches), prop_attn=method.prop_attn) as handle:
        yield handle, [repr(method)]


def schedule(method: ToMe, layers: int, patches: int | None) -> int | tuple[int, float] | list[int]:
    """Return how many tokens each block merges, as ``merging`` takes it.

    Raises:
        UsageError: options that contradict each other, or a number that cannot be reached.
    """
    if method.r is not None:
        if method.keep is not None:
            raise UsageError(f"tome: keep={method.keep} and r={method.r}: give one of them")
        if isinstance(method.r, tuple):
            return list(method.r)
        return (method.r, method.inflection)
    if patches is None:
        raise UsageError("tome: the patches of a picture are not known for this model; give r= instead of keep=")
    keep = DEFAULT_KEEP if method.keep is None else method.keep
    check_keep(keep)
    return schedule_to_keep(token_count(keep, patches), patches, layers)
