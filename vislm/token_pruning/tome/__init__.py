"""ToMe: in every layer of the vision tower, merge the patches whose keys are most alike.

``ToMe`` is the method for large multimodal models. ``merging`` does the same to a plain vision transformer of timm or
open_clip, without any language model: ``with vislm.token_pruning.tome.merging(vit, r=13): vit(images)``.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461;
github.com/facebookresearch/ToMe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from vislm.errors import UsageError
from vislm.kernels.matching import Matching, bipartite_soft_matching
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.tokens import check_keep, token_count
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import Alive, Positions, TowerMergeStage
from vislm.token_pruning.tome.schedule import merge_schedule, schedule_to_keep, sizes_behind
from vislm.token_pruning.tome.vit import Merging, merging

__all__ = ["METHOD", "Merging", "ToMe", "merging"]

DEFAULT_KEEP = 64


def match_keys(call: AttentionCall, r: int, prefix: int) -> Matching:
    """Return which ``r`` tokens merge by the cosine of their keys, averaged over heads; the ``prefix`` never does."""
    metric = call.key.float().mean(1)
    return bipartite_soft_matching(
        metric, r, class_token=prefix > 0, distill_token=prefix > 1, registers=max(0, prefix - 2)
    )


@dataclass(frozen=True)
class ToMe:
    """Merge patches between attention and MLP of every tower layer up to the one that the language model reads.

    A merged token is the mean of its patches; in the prompt it sits at the patch that the others were merged into.
    Needs no attention weights; every layer compares half of its tokens with the other half, in O(N^2 d_head).
    """

    keep: int | float | None = None
    """Patches of an image (of each crop, where the model cuts images into crops) that leave the tower, or a ratio of
    them: a constant number per layer is merged until they are reached. 64 unless ``r`` is given."""
    r: int | tuple[int, ...] | None = None
    """Patches to merge in every layer, or a list with one number per layer, continued by 0; in place of ``keep``."""
    inflection: float = 0.0
    """Let ``r`` be the mean of a number that changes linearly: from 2 r to 0 for -1, from 0 to 2 r for 1."""
    prop_attn: bool = True
    """Proportional attention: a key that stands for s patches counts s times."""
    positions: Positions = "contiguous"
    """There is no official code for language models; a prompt assembled from the survivors is numbered anew."""
    calibrate: bool = False
    """Add RESTORE's logit calibration, which lets a token that stands for s patches weigh like s tokens in the language
    model too (``vislm.lmm.decoder.calibration``)."""
    name = "tome"

    def plan(self, adapter: Adapter) -> Sequence[TowerMergeStage]:
        """Return one stage for each vision layer that merges anything.

        Raises:
            UsageError: both ``keep`` and ``r``, or one that cannot be reached.
            PlanConflict: a tower of another kind.
        """
        prefix = adapter.tower_prefix
        return [
            TowerMergeStage(
                layer,
                partial(match_keys, r=r, prefix=prefix),
                self.prop_attn,
                self.positions,
                expected=partial(_expected, r),
            )
            for layer, r in enumerate(self._schedule(adapter))
            if r > 0
        ]

    def _schedule(self, adapter: Adapter) -> list[int]:
        layers = adapter.read_layer + 1
        if self.r is not None:
            if self.keep is not None:
                raise UsageError(f"keep={self.keep} and r={self.r}: give one of them")
            if isinstance(self.r, tuple):
                if self.inflection:
                    raise UsageError(
                        f"inflection={self.inflection} with a list r={self.r}: give the list as it is meant"
                    )
                return merge_schedule(list(self.r), layers)
            return merge_schedule((self.r, self.inflection), layers)
        if self.inflection:
            raise UsageError(
                f"inflection={self.inflection} needs r=; keep={self.keep} decides how many each layer merges"
            )
        keep = DEFAULT_KEEP if self.keep is None else self.keep
        if adapter.patch_grid is None:
            raise UsageError("the patches of an image are not known before it is seen; give r= instead of keep=")
        patches = adapter.patch_grid[0] * adapter.patch_grid[1]
        check_keep(keep)
        return schedule_to_keep(token_count(keep, patches), patches, layers)


def _expected(r: int, alive: Alive) -> int:
    return sizes_behind([r], alive.tokens)[-1]


METHOD = ToMe
