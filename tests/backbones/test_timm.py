"""The variants as timm models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vislm.backbones import create_model, list_models, register_timm

timm = pytest.importorskip("timm")


def test_names_are_ours_but_where_timm_has_one() -> None:
    theirs = set(timm.list_models(exclude_filters="vislm_*")) - set(timm.list_models(module="timm_names"))
    names = register_timm()
    assert list(names) == list_models()
    assert {name for name, registered in names.items() if name != registered} == {"halonet_h1"}
    assert names["halonet_h1"] == "vislm_halonet_h1"
    assert register_timm() == names
    assert not theirs & set(names.values())
    assert set(timm.list_models(module="timm_names")) == set(names.values())


def test_models_and_their_preprocessing() -> None:
    register_timm()
    torch.manual_seed(0)
    model = timm.create_model("nat_mini", num_classes=7, drop_path_rate=0.0)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 224, 224)
    assert timm.get_pretrained_cfg("vislm_halonet_h1").input_size == (3, 256, 256)
    for name in ("nat_mini", "dinat_s_tiny", "halonet_h0"):
        cfg = timm.get_pretrained_cfg(name)
        with torch.device("meta"):
            parts = dict(create_model(name).named_modules())
        assert parts[cfg.first_conv].in_channels == 3
        assert parts[cfg.classifier].out_features == 1000


def test_feature_pyramids() -> None:
    register_timm()
    model = timm.create_model("dinat_mini", features_only=True, out_indices=(1, 3))
    features = model(torch.randn(1, 3, 100, 140))
    assert [tuple(feature.shape) for feature in features] == [(1, 128, 13, 18), (1, 512, 4, 5)]
    assert model.feature_info.channels() == [128, 512]
    assert model.feature_info.reduction() == [8, 32]
    assert not hasattr(model.model, "fc")


def test_there_are_no_weights_to_download() -> None:
    register_timm()
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("nat_mini", pretrained=True)


def test_importing_the_backbones_does_not_import_timm() -> None:
    script = "import sys, vislm.backbones; vislm.backbones.list_models(); assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
