"""CARVE's fixtures: the fused maps, masks of every strategy, and the cropped picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np
import torch
from PIL import Image

from vislm.golden.checks._complete import compared
from vislm.golden.fixtures import Comparison, Fixture, Skipped, difference, exact
from vislm.heads.carve import regions


def check(fixture: Fixture) -> Iterator[Comparison | Skipped]:
    """Compare what follows from both prompts' attention; a map's error is relative to its maximum."""
    yield from compared(fixture, _compare(fixture))


def _compare(fixture: Fixture) -> Iterator[Comparison]:
    options, out = fixture.kwargs, fixture.outputs
    question, general = (
        fixture.inputs[f"{name}_maps"][:, options["layers"]].numpy() for name in ("question", "general")
    )
    image = Image.fromarray(fixture.inputs["image"].numpy())
    for mode, steps in (("all", len(question)), ("first", 1)):
        values = regions.contrast(question[:steps], general[:steps], options["lam"])
        fused = regions.enlarge(values, tuple(options["grid"]), tuple(options["image_size_wh"]))
        largest = out[f"fused_{mode}"].abs().max()
        yield difference(f"fused_{mode}", torch.from_numpy(fused) / largest, out[f"fused_{mode}"] / largest, 1e-5)
        masks = {
            keep: regions.choose_regions(
                fused, options["top_percent"], keep, options["min_keep_regions"], options["outlier_percent"]
            )
            for keep in get_args(regions.Keep)
        }
        for keep, mask in masks.items():
            yield exact(f"mask_{mode}_{keep}", mask.astype(np.uint8), out[f"mask_{mode}_{keep}"])
        chosen = masks["attention_sum"]
        box = regions.bounding_box(chosen)
        yield exact(f"bbox_{mode}", list(box), out[f"bbox_{mode}"])
        yield exact(f"masked_image_{mode}", np.asarray(regions.black_out(image, chosen)), out[f"masked_image_{mode}"])
        yield exact(f"crop_size_{mode}", list(regions.refine(image, chosen).size), out[f"crop_size_{mode}"])
