"""What prompt stages see of an untouched tower: signals, features, and maps in the order of the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
from running import FAMILIES, families, generate, one_image
from torch import Tensor

from vislm import attach
from vislm.lmm.adapters import adapter_for
from vislm.lmm.interventions import ImageView, PromptStage, TowerSignal


@dataclass(frozen=True)
class Recorder:
    """Keeps everything, and shows each image's view to ``see``."""

    see: Any
    layer: int = 3
    name: str = "recorder"

    def plan(self, adapter) -> list[PromptStage]:
        signal = TowerSignal(self.layer, lambda call: call.rows(torch.tensor([0]))[:, :, 0])
        return [PromptStage(self._select, tower={"cls": signal})]

    def _select(self, view: ImageView) -> Tensor:
        self.see(view)
        return view.candidates | True


@families
def test_features_and_projector_give_the_tokens(family: str) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    views: list[ImageView] = []
    generate(model, inputs, Recorder(views.append), max_new_tokens=2)
    (view,) = views
    assert view.tower is not None
    assert view.tower.features is not None
    assert view.pack is not None
    assert view.project is not None
    crops = view.tower.features.shape[0]
    assert view.tower.signals["cls"].shape == (crops, 2, 17)
    assert view.tower.pixels is not None
    assert view.tower.pixels.shape == (crops, 3, 32, 32)
    tokens = view.pack(view.project(view.tower.features[:, 1:]), torch.nan)
    newline = tokens.isnan().all(-1)
    torch.testing.assert_close(tokens[~newline], view.features[~newline], atol=1e-5, rtol=1e-5)
    assert view.candidates.tolist() == (~newline).tolist()


def test_a_record_belongs_to_its_image_also_with_beams_and_several_images() -> None:
    model = models.llava()
    ids = models.left_pad(models.prompt(7, images=2), models.prompt(8, 9), torch.tensor([[1, 5, 6]]))
    inputs = {**ids, "pixel_values": models.pixels(3)}
    views: list[ImageView] = []
    for options in ({}, {"num_beams": 2}):
        views.clear()
        generate(model, inputs, Recorder(views.append), max_new_tokens=2, **options)
        assert len(views) == 3 * options.get("num_beams", 1)
        for view in views:
            assert view.project is not None
            assert view.tower is not None
            assert view.tower.features is not None
            torch.testing.assert_close(view.project(view.tower.features[0, 1:]), view.features, atol=1e-5, rtol=1e-5)


@families
def test_recording_changes_nothing(family: str) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    plain, _, _ = generate(model, inputs)
    recorded, _, _ = generate(model, inputs, Recorder(lambda view: None))
    assert torch.equal(plain, recorded)


def test_the_wrapped_method_is_uncovered_again() -> None:
    model = models.llava()
    with pytest.raises(ZeroDivisionError), attach(model, Recorder(lambda view: None)):
        assert "get_image_features" in vars(model.model)
        raise ZeroDivisionError
    assert "get_image_features" not in vars(model.model)
    assert adapter_for(model).model is model


def test_text_ids_are_the_prompt_without_images_and_padding() -> None:
    model = models.llava()
    seen: dict[int, list[int]] = {}
    ids = models.left_pad(models.prompt(7, 8, 9, 10), models.prompt(9))
    inputs = {**ids, "pixel_values": models.pixels(2)}

    def see(view: ImageView) -> None:
        assert view.text_ids is not None
        seen[view.sample] = view.text_ids.tolist()

    generate(model, inputs, Recorder(see), max_new_tokens=1)
    assert seen == {0: [1, 5, 6, 7, 8, 9, 10], 1: [1, 5, 6, 9]}
