"""FastV's options: the random baseline, average budgets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "lmm"))
import models
from running import FAMILIES, GENERATE, families, generate, mixed_batch, one_image

from vislm import FastV, attach
from vislm.errors import PlanConflict, UsageError


def test_layer_zero_keeps_a_random_choice_before_the_language_model() -> None:
    model, inputs = models.llava(), one_image("llava")
    kept = [generate(model, inputs, FastV(keep=5, layer=0, seed=seed))[2] for seed in (0, 0, 1)]
    assert [run.layer_tokens for run in kept] == [[6 + 5] * 5] * 3
    assert kept[0].stages[0].index == kept[1].stages[0].index != kept[2].stages[0].index


def test_a_random_choice_depends_on_the_image_alone() -> None:
    model, method = models.llava(), FastV(keep=5, layer=0)
    batch, singles = mixed_batch()
    together, _, run = generate(model, batch, method)
    kept = []
    for row, inputs in enumerate(singles):
        alone, _, single = generate(model, inputs, method)
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=1e-4, rtol=0)
        kept += single.stages[-1].index if single.stages else []
    assert run.stages[-1].index == kept


@families
@pytest.mark.parametrize(
    "method", [FastV(keep=1.0, layer=0), FastV(keep=1.0, average=True), FastV(keep=1.0, calibrate=True)], ids=str
)
def test_keeping_everything_is_bit_identical(family, method) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    plain = model.generate(**inputs, **GENERATE)
    assert torch.equal(torch.stack(plain.logits), generate(model, inputs, method)[0])


def test_an_average_budget_counts_the_first_layers() -> None:
    model, inputs = models.llava(), one_image("llava")
    _, _, run = generate(model, inputs, FastV(keep=10, average=True))
    assert [n - 6 for n in run.layer_tokens] == [16, 16, 6, 6, 6]
    _, _, run = generate(model, inputs, FastV(keep=0.625, average=True))
    assert [n - 6 for n in run.layer_tokens] == [16, 16, 6, 6, 6]


def test_images_of_different_sizes_have_their_own_average() -> None:
    model, inputs = models.llava_next(), one_image("llava_next")
    _, _, run = generate(model, inputs, FastV(keep=0.625, average=True))
    assert [n - 6 for n in run.layer_tokens] == [72, 72, 27, 27, 27]


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 6, "average": True}], ids=str)
def test_impossible_budgets(options) -> None:
    with pytest.raises(UsageError), attach(models.llava(), FastV(**options)):
        pass


@pytest.mark.parametrize("layer", [-1, 5])
def test_layers_outside_the_model_are_refused(layer) -> None:
    with pytest.raises(PlanConflict), attach(models.llava(), FastV(keep=4, layer=layer)):
        pass
