"""How far a backbone sees and what it costs here."""

from __future__ import annotations

import pytest
import torch

from vislm.backbones import HierarchicalConfig, StageConfig, build, list_models, variant
from vislm.backbones.facts import measure, receptive_fields

FAMILIES = {variant(name).path.parent.name: name for name in reversed(list_models())}


def patches(depth: int, **mixer) -> torch.nn.Module:
    """Return a backbone of one stage on patches of 4 pixels."""
    stage = StageConfig(dim=8, depth=depth, num_heads=2)
    torch.manual_seed(0)
    return build(HierarchicalConfig(stages=(stage,), stem={"name": "patch"}, mixer=mixer, ffn={"name": "mlp"}))


@pytest.mark.parametrize(("depth", "tokens"), [(1, 3), (2, 5), (4, 9)])
def test_windows_add_up(depth, tokens) -> None:
    model = patches(depth, name="neighborhood", window_size=3)
    assert receptive_fields(model, (80, 96)) == [(4 * tokens, 4 * tokens)]


def test_dilation_reaches_further_and_dense_attention_everywhere() -> None:
    assert receptive_fields(patches(1, name="neighborhood", window_size=3, dilation=4), (80, 96)) == [(36, 36)]
    assert receptive_fields(patches(1, name="dense"), (80, 96)) == [(80, 96)]


def test_fields_of_stages_grow(small) -> None:
    torch.manual_seed(0)
    fields = receptive_fields(small("nat_tiny"), (128, 160))
    assert len(fields) == 4
    assert all(a <= b for a, b in zip(fields[0], fields[-1], strict=True))
    assert fields[-1] == (128, 160)


@pytest.mark.filterwarnings("ignore:.* agents on a map of:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_sees_something(small, family) -> None:
    torch.manual_seed(0)
    model = small(FAMILIES[family])
    for (rows, columns), info in zip(receptive_fields(model, (64, 96)), model.feature_info, strict=True):
        assert info["reduction"] <= rows <= 64
        assert info["reduction"] <= columns <= 96


def test_cost_grows_with_the_image(small) -> None:
    model = small("nat_tiny")
    near, far = measure(model, (64, 64), runs=1), measure(model, (512, 512), runs=1)
    assert 0 < near.milliseconds < far.milliseconds
    if near.memory is not None:
        assert near.memory < far.memory
    assert not model.training
