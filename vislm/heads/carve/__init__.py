"""CARVE: ask twice, see where the question looks and a general instruction does not, and ask about that part again.

Source: Ge et al., "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning", ECCV 2026, arXiv 2509.06461;
github.com/YuyaoGe/CARVE. The released code runs without a key-value cache; nothing here depends on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vislm.errors import PlanConflict, UsageError
from vislm.heads.carve.regions import Box, Keep, bounding_box, choose_regions, contrast, enlarge, refine
from vislm.images import load_image
from vislm.lmm.adapters import Adapter
from vislm.lmm.choosing.layer_ranges import chosen_layers
from vislm.lmm.interventions import EditStage, EditView

if TYPE_CHECKING:
    from vislm.lmm.model import LMM, ImageSource

Version = Literal["v1", "v2", "v3", "v4"]
VERSIONS: dict[Version, tuple[bool, Keep]] = {
    "v1": (False, "remove_small"),
    "v2": (False, "size"),
    "v3": (False, "attention_sum"),
    "v4": (True, "attention_sum"),
}
"""Version -> whether all generated tokens count or the first alone, and how regions are chosen."""
GENERAL = "Write a general description of the image."
SUFFIX = " Answer the question using a single word or phrase."


@dataclass(frozen=True)
class CarveResult:
    """What :func:`carve` found on the way to its answer. W and H are the picture's width and height."""

    answer: str
    first_answer: str
    """To the whole picture; cut off behind the first token in versions that look at no other."""
    fused: np.ndarray
    """(H, W) float64: the contrast of attention over layers and steps."""
    mask: np.ndarray
    """(H, W) bool: what was kept of the picture."""
    box: Box
    """(left, top, right, bottom) of the mask."""
    refined: Image.Image
    """The picture that was asked about again."""
    steps: int
    """Generated tokens that were compared."""


@dataclass(frozen=True)
class Recorder:
    """Looks at the last row's attention on the image tokens at every step, and changes nothing."""

    layers: tuple[int, ...] | None = None
    rows: list[dict[int, Tensor]] = field(default_factory=list)
    """One entry per step: layer -> (n,) head mean on the image keys that are there."""
    tokens: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> (n,) which of the image's N tokens those are."""
    name = "carve"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Return a stage that edits nothing."""
        return [EditStage(chosen_layers(self.layers, len(adapter.layers), 20, 26), self._look, observes=True)]

    def _look(self, view: EditView) -> None:
        if view.logits.shape[0] != 1:
            raise UsageError(f"CARVE looks at one sequence at a time, not at {view.logits.shape[0]}; use num_beams=1")
        image = view.keys.image[0]
        if not self.rows or view.layer in self.rows[-1]:
            self.rows.append({})
        self.rows[-1][view.layer] = view.softmax()[0, :, 0].mean(0)[image].cpu()
        self.tokens[view.layer] = view.keys.token_of[0, image].cpu()

    def maps(self, count: int) -> np.ndarray:
        """Return (steps, layers, N) of an image of ``count`` tokens; tokens that were pruned away have 0."""
        maps = torch.zeros(len(self.rows), len(self.tokens), count)
        for place, (layer, tokens) in enumerate(sorted(self.tokens.items())):
            maps[:, place, tokens] = torch.stack([row[layer] for row in self.rows])
        return maps.numpy()


@dataclass(frozen=True)
class Carve:
    """The options of :func:`carve`. As it asks three times, it is called and not attached."""

    version: Version = "v4"
    layers: tuple[int, ...] | None = None
    """Decoder layers that are looked at, 0-based; None: 20-25 of every 32."""
    lam: float = 1e-8
    top_percent: float = 0.2
    """Share of the pixels that are candidates, and of their regions that are kept."""
    min_keep: int = 3
    """Regions that are kept at least."""
    outlier_percent: float = 10.0
    """In version v1, regions with less than this percentage of the candidates are dropped."""
    reask: Literal["paper_refined_only", "code_both_images"] = "paper_refined_only"
    """What is asked about at last: the refined picture, or the original and the refined one."""
    max_new_tokens: int = 32
    suffix: str = SUFFIX
    """Put behind both prompts."""
    general: str = GENERAL
    name = "carve"

    def plan(self, adapter: Adapter) -> Sequence[EditStage]:
        """Raise ``PlanConflict``: there is nothing to attach."""
        raise PlanConflict(
            "carve asks about a picture three times, so it cannot be attached to a model; call vislm.heads.carve.carve("
            "lmm, image, question), or vislm carve on the command line; other methods may be attached around it"
        )

    def check(self) -> None:
        """Raise ``UsageError`` for impossible values."""
        if self.version not in VERSIONS:
            raise UsageError(f"version={self.version!r}: expected one of {', '.join(VERSIONS)}")
        if not 0.0 < self.top_percent <= 1.0:
            raise UsageError(f"top_percent={self.top_percent}: expected a share in (0, 1]")
        if not self.lam > 0.0:
            raise UsageError(f"lam={self.lam}: expected a number > 0")
        if self.min_keep < 1 or not 0.0 <= self.outlier_percent <= 100.0:
            raise UsageError(
                f"min_keep={self.min_keep}, outlier_percent={self.outlier_percent}: expected min_keep >= 1 "
                "and a percentage"
            )


def carve(lmm: LMM, image: ImageSource, question: str, **options: Any) -> CarveResult:
    """Answer a question about one picture with CARVE.

    Interventions in force (``lmm.using``) act in all three passes; what is looked at is the attention that they leave.

    Args:
        lmm: the model.
        image: a path or a PIL image.
        question: plain text.
        options: of :class:`Carve`.

    Raises:
        UsageError: an impossible option.
        ImageError: the picture cannot be read.
        PlanConflict: a method in force decodes by a search of its own (opera).
    """
    chosen = Carve(**options)
    chosen.check()
    picture, (all_steps, keep) = load_image(image), VERSIONS[chosen.version]
    asked, limit = question + chosen.suffix, chosen.max_new_tokens if all_steps else 1
    first_answer, about_question = _watched(lmm, picture, asked, chosen.layers, limit)
    _, in_general = _watched(lmm, picture, chosen.general + chosen.suffix, chosen.layers, len(about_question.rows))
    fused = _fused(lmm, about_question, in_general, chosen.lam, picture.size)
    mask = choose_regions(fused, chosen.top_percent, keep, chosen.min_keep, chosen.outlier_percent)
    refined = refine(picture, mask)
    shown = [picture, refined] if chosen.reask == "code_both_images" else [refined]
    answer = lmm.ask(shown, asked, max_new_tokens=chosen.max_new_tokens)
    steps = min(len(about_question.rows), len(in_general.rows))
    return CarveResult(answer, first_answer, fused, mask, bounding_box(mask), refined, steps)


def _watched(
    lmm: LMM, picture: Image.Image, prompt: str, layers: tuple[int, ...] | None, limit: int
) -> tuple[str, Recorder]:
    """Return the answer to a prompt and what the model looked at meanwhile."""
    recorder = Recorder(layers)
    with lmm.using(recorder):
        return lmm.ask(picture, prompt, max_new_tokens=limit), recorder


def _fused(lmm: LMM, question: Recorder, general: Recorder, lam: float, size: tuple[int, int]) -> np.ndarray:
    """Return the contrast map (H, W): the mean over the token grids that show the whole picture."""
    run = lmm.last_run
    assert run is not None
    assert run.features is not None
    count = run.visual_tokens[0]
    values = contrast(question.maps(count), general.maps(count), lam)
    maps = []
    for grid in lmm.adapter.grids(run.features[0], run.spans[0]):
        places = grid.start + np.arange(grid.height)[:, None] * grid.row_stride + np.arange(grid.width)
        maps.append(enlarge(values[places], (grid.height, grid.width), size))
    return np.mean(maps, axis=0)


METHOD = Carve
