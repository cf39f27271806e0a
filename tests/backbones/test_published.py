"""Every variant has its published size and cost; every file says where its figures come from."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from vislm.backbones import create_model, list_models, variant

NAMES = list_models()
WITHOUT_ACCURACY = {"van_b5"}  # published after pre-training on ImageNet-22K alone


def test_all_published_variants_are_there() -> None:
    families = {
        "nat_*": 6,
        "dinat_*": 14,
        "dinat_s_*": 5,
        "dinat_large_384*": 2,
        "halonet_h?": 8,
        "vit_rpb_*": 2,
        "agent_deit_*": 4,
        "agent_pvt_*": 5,
        "agent_swin_*": 5,
        "agent_cswin_*": 4,
        "stvit_*": 6,
        "van_b?": 7,
        "sg_former_*": 3,
        "moh_vit_*": 4,
    }
    assert {pattern: len(list_models(pattern)) for pattern in families} == families
    assert {name for pattern in families for name in list_models(pattern)} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_adds(name) -> None:
    with torch.device("meta"):
        model = create_model(name)
    published = variant(name).published
    assert sum(parameter.numel() for parameter in model.parameters()) == published.params
    if published.gmacs is not None:
        side = published.input_size
        assert model.macs((side, side)) / 1e9 == pytest.approx(published.gmacs, rel=0.01)


def test_dilations_alternate_with_what_fits_the_map() -> None:
    with torch.device("meta"):
        model = create_model("dinat_large_384")
    dilations = [[block.attn.dilation[0] for block in stage.blocks] for stage in model.stages]
    assert dilations == [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]


@pytest.mark.parametrize("name", NAMES)
def test_files_say_what_they_are(name) -> None:
    entry = variant(name)
    assert entry.path.read_text(encoding="utf-8").startswith("# ")
    assert "arXiv" in entry.published.source
    assert entry.published.top1 is not None or name in WITHOUT_ACCURACY


def test_the_files_lie_beside_the_other_configurations() -> None:
    link = Path(__file__).parents[2] / "configs" / "backbones"
    assert link.resolve() == variant("nat_tiny").path.parents[1].resolve()


def test_multiply_adds_grow_linearly_with_the_pixels() -> None:
    with torch.device("meta"):
        model = create_model("nat_tiny")
    costs = [model.macs((side, side)) - 512 * 1000 for side in (224, 448, 896)]
    assert [round(math.log2(b / a), 6) for a, b in itertools.pairwise(costs)] == [2.0, 2.0]
