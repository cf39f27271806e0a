"""Names, files and overrides; every fault is named."""

from __future__ import annotations

import pytest
import torch

from vislm.backbones import HierarchicalConfig, build, create_model, list_models, variant
from vislm.errors import UnknownName, UsageError

FILE = """
skeleton: hierarchical
published: {source: mine, params: 1}
model:
  stem: {name: patch, patch_size: 8}
  downsample: merge
  mixer: {name: window, window_size: 4}
  ffn: {name: mlp, ratio: 2}
  stages:
    - {dim: 8, depth: 2, num_heads: 1, blocks: [{shifted: false}, {shifted: true}]}
    - {dim: 16, depth: 1, num_heads: 2, blocks: [{name: neighborhood, window_size: 3, small_input: shrink}]}
"""


def test_a_file_of_ones_own(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    model = create_model(str(path), num_classes=3, in_chans=1)
    assert [type(block.attn).__name__ for stage in model.stages for block in stage.blocks] == [
        "WindowAttention",
        "WindowAttention",
        "NeighborhoodAttention",
    ]
    assert [block.attn.shifted for block in model.stages[0].blocks] == [False, True]
    assert model(torch.randn(2, 1, 40, 60)).shape == (2, 3)


def test_overrides_change_what_they_name() -> None:
    config = variant("dinat_mini").configured(mixer={"small_input": "shrink"}, drop_path_rate=0, stem="patch")
    assert isinstance(config, HierarchicalConfig)
    assert config.mixer == {**variant("dinat_mini").config.mixer, "small_input": "shrink"}
    assert config.stem == {"name": "patch"}
    assert config.drop_path_rate == 0.0
    assert variant("nat_mini").configured(mixer={"name": "window"}).mixer == {"name": "window"}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("nat_tny", {}, "did you mean 'nat_tiny'"),
        ("nat_tiny", {"num_clases": 3}, "did you mean 'num_classes'"),
        ("nat_tiny", {"num_classes": "3"}, "num_classes is '3', expected a whole number"),
        ("nat_tiny", {"num_classes": True}, "expected a whole number"),
        ("nat_tiny", {"drop_path_rate": None}, "expected a number"),
        ("nat_tiny", {"mixer": {"windw_size": 3}}, "did you mean 'window_size'"),
        ("nat_tiny", {"mixer": {"name": "neighbrhood"}}, "did you mean 'neighborhood'"),
        ("nat_tiny", {"mixer": 3}, "expected options"),
        ("nat_tiny", {"stem": "cnv"}, "did you mean 'conv'"),
        ("nat_tiny", {"ffn": {"name": "mlpp"}}, "did you mean 'mlp'"),
        ("nat_tiny", {"downsample": {"nme": "conv"}}, "unknown option of the downsample conv 'nme'"),
        ("nat_tiny", {"downsample": None}, "4 stages need a downsample"),
        ("nat_tiny", {"stages": []}, "expected a list"),
        ("nat_tiny", {"stages": [{"dim": 8}]}, r"stages\[0\] lacks depth, num_heads"),
        ("nat_tiny", {"stages": [{"dim": 8, "depth": 1, "num_heads": 2, "hedas": 3}]}, "hedas"),
        ("halonet_h0", {"act": "rellu"}, "did you mean 'relu'"),
        ("halonet_h0", {"mixer": {"halo": 3}}, "halo"),
    ],
)
def test_faults_are_named(name, overrides, message) -> None:
    with pytest.raises(UsageError, match=message):
        create_model(name, **overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "cannot read"),
        ("!!python/object/apply:os.system ['true']", "cannot read"),
        ("- 1", "expected a mapping"),
        ("skeleton: hierarchical", "lacks published, model"),
        (FILE.replace("skeleton: hierarchical", "skeleton: hierarchicl"), "did you mean 'hierarchical'"),
        (FILE.replace("params: 1", "parms: 1"), "did you mean 'params'"),
        (FILE.replace("downsample", "downsmple"), "did you mean 'downsample'"),
        (FILE.replace("depth: 2", "depth: two"), r"depth is 'two', expected a whole number"),
    ],
)
def test_faulty_files_name_the_key_and_the_file(tmp_path, content, message) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        variant(str(path))
    assert str(path) in str(error.value)


def test_missing_files() -> None:
    with pytest.raises(UsageError, match="cannot read"):
        variant("absent.yaml")


def test_patterns() -> None:
    assert list_models("nat_t*") == ["nat_tiny"]
    assert list_models("absent") == []
    with pytest.raises(UnknownName):
        variant("absent")


def test_components_need_names() -> None:
    config = variant("nat_tiny").config
    assert isinstance(config, HierarchicalConfig)
    with pytest.raises(UsageError, match="stem is"):
        build(HierarchicalConfig(stages=config.stages, stem={}, mixer=config.mixer, ffn=config.ffn))
