"""VFlowOpt: one importance map from the vision tower, merging of what is dropped, three stages of pruning.

Source: Yang et al., "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
ICCV 2025, arXiv 2508.05211; github.com/sihany077/VFlowOpt.

Notation: n visual tokens of an image, L decoder layers, R1, R2, R3 the share of tokens that each stage keeps, t the
anchors' threshold, alpha the weight of the patch entropy, a the side of a recycling cell in tokens. The optimisation of
these six numbers is ``vislm tune-pruning``; it serves every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from vislm.errors import PlanConflict, UsageError
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.ranking import image_columns
from vislm.lmm.choosing.tokens import check_keep
from vislm.lmm.decoder.calibration import calibration_stage
from vislm.lmm.interventions import (
    Alive,
    BiasStage,
    ImageView,
    LanguageStage,
    LanguageView,
    Positions,
    PromptStage,
    Selection,
    TowerSignal,
)
from vislm.token_pruning.vflowopt.map import Pixels, context, grey_levels, importance, patch_entropy
from vislm.token_pruning.vflowopt.recycling import (
    cell_numbers,
    expected_count,
    keep_count,
    keep_highest,
    recycle,
    stage_counts,
)
from vislm.token_pruning.vflowopt.schedule import Retention, solve_retention, stage_lengths
from vislm.token_pruning.vflowopt.sdpa import unmasked


@dataclass(frozen=True)
class VFlowOpt:
    """Rank once in the tower, drop and recycle before the language model, drop again before two of its layers.

    I = m + alpha softmax(E): m the attention a patch gets from the anchors of one vision layer, E the entropy of its
    pixels. Stage 1 merges the dropped tokens of each cell into one.
    """

    keep: int | float = 0.25
    """Average share of the visual tokens over all decoder layers (or their average number, per image); determines those
    of R1, R2 and R3 that are not given, and nothing if all are."""
    R1: float | None = field(default=None, metadata={"range": lambda budget, layers: (budget, min(1.0, 1.5 * budget))})
    """Stage 1, before the language model."""
    R2: float | None = field(default=None, metadata={"range": (0.8 / 1.5, 1.0)})
    """Stage 2, before decoder layer ``layers[0]``."""
    R3: float | None = None
    """Stage 3, before decoder layer ``layers[1]``."""
    t: float = field(default=30.0, metadata={"range": (0.0, 50.0)})
    """Anchors receive more than t times the mean attention."""
    alpha: float = field(default=0.0, metadata={"range": (-1.0, 1.0)})
    """Weight of the entropy; 0 in all released settings."""
    a: float = field(default=15.0, metadata={"range": (3.0, 24.0)})
    """Side of a recycling cell in tokens; n / a^2 tokens are recycled."""
    layers: tuple[int, ...] | None = None
    """Decoder layers (k2, k3) before which stages 2 and 3 act; default: the first and second third, 9 and 18 of 28."""
    layer: int | None = None
    """Vision layer of the importance; default: the one that the language model reads."""
    recycle: bool = True
    """Off: plain top-k in stage 1, as the released code does for videos and several images."""
    pixels: Pixels = "auto"
    """How pixels are normalised, for the entropy; "wrapped" is the official code, which takes normalised pixels times
    255 modulo 256."""
    empty_anchors: Literal["strongest", "nan"] = "strongest"
    """When nothing exceeds the threshold: one anchor, or NaN as in the official code."""
    positions: Positions = "contiguous"
    """Of what stage 1 leaves; the official code assembles the prompt from it."""
    language_positions: Positions = "original"
    """Of what stages 2 and 3 leave."""
    calibrate: bool = False
    """Add RESTORE's logit calibration, which lets merged tokens weigh like those they stand for
    (``vislm.lmm.decoder.calibration``)."""
    unmasked_layer: bool = False
    """For tests: let layer k2 - 1 attend in both directions, as it does in every released SDPA run."""
    name = "vflowopt"

    def plan(self, adapter: Adapter) -> Sequence[PromptStage | LanguageStage | BiasStage]:
        """Return the stage before the language model and those inside it."""
        check_keep(self.keep)
        self._check(adapter)
        layer = adapter.read_layer if self.layer is None else self.layer
        adapter.check_tower_signal(layer)
        signal = partial(context, t=self.t, prefix=adapter.tower_prefix, empty_anchors=self.empty_anchors)
        select = partial(self._stage_1, adapter, self._lengths(adapter))
        prompt = PromptStage(
            select,
            self.positions,
            {"context": TowerSignal(layer, signal)},
            expected=partial(self._expected, self._lengths(adapter)),
            assumes="every recycling cell loses a token" if self.recycle else None,
        )
        calibration = [calibration_stage()] if self.calibrate else []
        return [prompt, *self.language_stages(adapter), *calibration]

    def language_stages(self, adapter: Adapter) -> list[LanguageStage]:
        """Return stages 2 and 3; they read the importance that stage 1 left in the memory."""
        lengths = self._lengths(adapter)
        stages = [
            LanguageStage(
                before,
                None,
                _no_signal,
                partial(self._later, lengths, stage),
                self.language_positions,
                expected=partial(self._expected_later, lengths, stage),
            )
            for stage, before in enumerate((lengths[0], lengths[0] + lengths[1]), start=1)
        ]
        if not self.unmasked_layer:
            return stages
        if not lengths[0]:
            raise PlanConflict("vflowopt: unmasked_layer needs a layer before stage 2")
        return unmasked(adapter, stages)

    def retention(self, tokens: int, lengths: Sequence[int]) -> Retention:
        """Return R1, R2, R3 for an image of ``tokens`` visual tokens and stages of ``lengths`` decoder layers."""
        average = self.keep if isinstance(self.keep, float) else min(1.0, self.keep / tokens)
        return solve_retention(average, lengths, self.R1, self.R2, self.R3)

    def _check(self, adapter: Adapter) -> None:
        for name in ("R1", "R2", "R3"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise UsageError(f"vflowopt: {name}={value}: expected a share in (0, 1]")
        if self.a < 1.0 or self.t < 0.0:
            raise UsageError(f"vflowopt: a={self.a}, t={self.t}: expected a >= 1 and t >= 0")
        if isinstance(self.keep, float):
            self.retention(1, self._lengths(adapter))

    def _lengths(self, adapter: Adapter) -> tuple[int, int, int]:
        """Return L1, L2, L3: decoder layers that run with the tokens of each stage."""
        return stage_lengths(self.layers, len(adapter.layers))

    def _stage_1(self, adapter: Adapter, lengths: Sequence[int], view: ImageView) -> Selection:
        tokens = len(view.features)
        score = self._importance(adapter, view)
        view.memory.setdefault("importance", {})[view.image] = score
        grids = adapter.grids(view.features, view.span) if self.recycle else []
        cells = cell_numbers(grids, tokens, self.a).to(score.device)
        drop, recycled = stage_counts(tokens, int((cells >= 0).sum()), self.retention(tokens, lengths).r1, self.a)
        if not drop:  # nothing to recycle
            return Selection(torch.ones_like(view.candidates))
        return recycle(view.features, score, cells, drop, recycled)

    def _expected(self, lengths: Sequence[int], alive: Alive) -> int:
        grids = alive.grids if self.recycle else ()
        return expected_count(grids, alive.tokens, self.retention(alive.total, lengths).r1, self.a)

    def _expected_later(self, lengths: Sequence[int], stage: int, alive: Alive) -> int:
        return keep_count(alive.tokens, self.retention(alive.total, lengths)[stage])

    def _importance(self, adapter: Adapter, view: ImageView) -> Tensor:
        """Return I (n,) of an image's tokens; 1 for newline tokens."""
        assert view.tower is not None  # the stage asks for a tower signal
        assert view.pack is not None
        entropy = None
        if self.alpha != 0.0:
            if view.tower.pixels is None:
                raise UsageError(
                    f"vflowopt: alpha={self.alpha} needs pixels, which {adapter.family} cuts up; set alpha=0"
                )
            size, tower = adapter.vision_config.patch_size, adapter.vision_config.model_type
            levels = grey_levels(view.tower.pixels, self.pixels, tower)
            entropy = patch_entropy(levels, size if isinstance(size, int) else size[0])
        maps = importance(view.tower.signals["context"], entropy, self.alpha)
        return view.pack(maps.unsqueeze(-1), 1.0).squeeze(-1).float()

    def _later(self, lengths: Sequence[int], stage: int, view: LanguageView) -> Tensor:
        """Return keep (B, S): of each image the tokens with the highest importance."""
        keep = view.image_of < 0
        for (row, image), columns in image_columns(view.image_of):
            ratio = self.retention(view.visual_tokens[image], lengths)[stage]
            score = view.memory["importance"][image][view.token_of[row, columns]]
            keep[row, columns[keep_highest(score, ratio)]] = True
        return keep


def _no_signal(call: Any) -> None:
    """Stages 2 and 3 rank by what the tower has found."""


METHOD = VFlowOpt
