"""VAR, ACT and PAINT together, each in its own layers, on every family."""

from __future__ import annotations

import families
import pytest
import torch
from running import generate

from vislm.heads.act import ACT
from vislm.heads.carve import Recorder
from vislm.heads.imbalanced import Imbalanced
from vislm.heads.var import VAR
from vislm.lmm.adapters import adapter_for

METHODS = (
    VAR(dims=(3, 7, 20), tau=1.6, summ=0.0, rho=1.0, layers=(2,)),
    ACT(heads=((0, 0), (1, 3)), beta=0.2, threshold=0.04),
    Imbalanced(layers=(3, 4)),
)


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_batch_gives_what_its_samples_give_alone(name: str) -> None:
    family, model = families.FAMILIES[name], families.build(name)
    first = ([family.picture(0, 0)], [7, 8, 9])
    second = ([family.picture(1, 1), family.picture(2, 2)], [9])
    alone, _, run = generate(model, families.inputs(name, first), *METHODS, max_new_tokens=3)
    together, _, _ = generate(model, families.inputs(name, first, second), *METHODS, max_new_tokens=3)
    torch.testing.assert_close(together[:, 0], alone[:, 0], atol=2e-4, rtol=1e-4)
    plain, _, _ = generate(model, families.inputs(name, first), max_new_tokens=3)
    assert (alone - plain).abs().max() > 1e-3
    assert set(run.memory[0]["sinks"]) == {2}
    assert set(run.memory[1]["sinks"]) == {0, 1}
    assert len(run.memory[2]["local"][0]) + len(run.memory[2]["summary"][0]) > 0


@pytest.mark.parametrize("name", families.FAMILIES)
def test_carves_maps_cover_the_token_grids(name: str) -> None:
    family, model = families.FAMILIES[name], families.build(name)
    recorder = Recorder(layers=(1, 3))
    _, _, run = generate(model, families.inputs(name, ([family.picture(0, 0)], [7])), recorder, max_new_tokens=2)
    maps = recorder.maps(run.visual_tokens[0])
    assert maps.shape == (2, 2, run.visual_tokens[0])
    assert (maps > 0).all()
    for grid in adapter_for(model).grids(run.features[0], run.spans[0]):
        assert grid.start + (grid.height - 1) * grid.row_stride + grid.width <= run.visual_tokens[0]
