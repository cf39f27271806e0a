"""The variants as timm models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vislm.backbones import create_model, list_models, register_timm, variant
from vislm.errors import UsageError

timm = pytest.importorskip("timm")
optim = pytest.importorskip("timm.optim")


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


def test_every_variant_says_how_images_are_prepared() -> None:
    for name, registered in register_timm().items():
        cfg = timm.get_pretrained_cfg(registered)
        side = variant(name).published.input_size
        assert (cfg.input_size, cfg.num_classes) == ((3, side, side), 1000)
        assert cfg.interpolation in ("bicubic", "bilinear")
        assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("nat_tiny").to_dict())
    assert timm.data.create_transform(**config)(Image.new("RGB", (300, 260))).shape == (3, 224, 224)


def test_weights_from_a_file(tmp_path) -> None:
    register_timm()
    torch.manual_seed(0)
    sizes = {"stages": [{"dim": 8, "depth": 1, "num_heads": 2}], "downsample": None}
    model = timm.create_model("nat_mini", **sizes)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    expected = model.eval()(torch.ones(1, 3, 64, 64))
    for options in (
        {"checkpoint_path": str(path)},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}},
    ):
        other = timm.create_model("nat_mini", **sizes, **options).eval()
        torch.testing.assert_close(other(torch.ones(1, 3, 64, 64)), expected)
    ours = create_model("nat_mini", weights=path, **sizes).eval()
    torch.testing.assert_close(ours(torch.ones(1, 3, 64, 64)), expected)


@pytest.mark.parametrize("name", ["nat_mini", "agent_deit_tiny", "halonet_h0", "stvit_small"])
def test_learning_rates_fall_layer_by_layer(name) -> None:
    with torch.device("meta"):
        model = create_model(name)
    depth = len(timm.models.group_parameters(model, model.group_matcher(), reverse=False, return_values=False))
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == {key for key, _ in model.named_parameters()}
    assert min(layers.values()) == 0
    assert layers[next(key for key in layers if key.startswith("stem"))] == 0
    assert layers["head.fc.weight"] == max(layers.values()) == depth - 1
    order = [layers[key] for key in layers if ".attn" in key]
    assert order == sorted(order)
    groups = optim.param_groups_layer_decay(model, layer_decay=0.7)
    assert len({group["lr_scale"] for group in groups}) == depth
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert max(coarse.values()) <= depth


def test_feature_pyramids() -> None:
    register_timm()
    model = timm.create_model("dinat_mini", features_only=True, out_indices=(1, 3))
    features = model(torch.randn(1, 3, 100, 140))
    assert [tuple(feature.shape) for feature in features] == [(1, 128, 13, 18), (1, 512, 4, 5)]
    assert model.feature_info.channels() == [128, 512]
    assert model.feature_info.reduction() == [8, 32]
    assert not hasattr(model.model, "fc")


@pytest.mark.filterwarnings("ignore:Importing from timm.models.helpers:FutureWarning")
@pytest.mark.parametrize(("projection", "width"), [("linear", 8), ("", 8), ("none", 256)])
def test_towers_of_open_clip(projection, width) -> None:
    open_clip = pytest.importorskip("open_clip")
    register_timm()
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    vision = {"timm_model_name": "halonet_h0", "timm_pool": "avg", "timm_proj": projection, "image_size": 64}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    model.lock_image_tower(unlocked_groups=1)
    assert not next(model.visual.trunk.parameters()).requires_grad
    model.set_grad_checkpointing()
    assert model.encode_image(torch.randn(2, 3, 64, 64)).shape == (2, width)
    found = model.visual.forward_intermediates(torch.randn(1, 3, 64, 64), indices=[1, 3])
    assert [tuple(x.shape) for x in found["image_intermediates"]] == [(1, 64, 8, 8), (1, 256, 2, 2)]


def test_other_ways_to_pool_are_refused() -> None:
    with pytest.raises(UsageError, match="expected 'avg'"):
        timm.create_model(register_timm()["nat_mini"], global_pool="max")


FAMILIES = {variant(name).path.parent.name: name for name in reversed(list_models())}


@pytest.mark.parametrize("family", FAMILIES)
def test_options_that_timms_scripts_give(family) -> None:
    registered = register_timm()[FAMILIES[family]]
    with torch.device("meta"):
        model = timm.create_model(
            registered, in_chans=1, num_classes=3, img_size=96, global_pool="avg", drop_rate=0.1, drop_path_rate=0.2
        )
        features = timm.create_model(registered, features_only=True)
    assert model.head.drop.p == 0.1
    assert model.global_pool == "avg" if hasattr(model, "global_pool") else True
    assert features.feature_info.channels() == [info["num_chs"] for info in model.feature_info]


def test_there_are_no_weights_to_download() -> None:
    register_timm()
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("nat_mini", pretrained=True)


def test_importing_the_backbones_does_not_import_timm() -> None:
    script = "import sys, vislm.backbones; vislm.backbones.list_models(); assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
