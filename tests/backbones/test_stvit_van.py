"""What STViT and VAN bring to the skeleton: batch norms, projection, per-stage options, initial values, their names."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from vislm.backbones import create_model, from_official
from vislm.backbones.backbone import Backbone
from vislm.backbones.norms import BatchNorm
from vislm.backbones.official import convert
from vislm.errors import CheckpointError, UnknownName

STVIT = {
    "stages": [
        {"dim": 8, "depth": 1, "num_heads": 2, "blocks": [{"stoken_size": 4}]},
        {"dim": 12, "depth": 2, "num_heads": 3, "blocks": [{"stoken_size": 1}], "layer_scale": 0.5},
    ],
    "final": {"num_features": 16},
    "num_classes": 3,
}
VAN = {
    "stages": [
        {"dim": dim, "depth": depth, "num_heads": 1, "ffn": {"ratio": 2}}
        for dim, depth in ((8, 1), (8, 2), (12, 1), (16, 1))
    ],
    "num_classes": 3,
}


def shaken(name: str, fields: dict) -> Backbone:
    """Return a model in evaluation mode with random affine maps and running statistics."""
    torch.manual_seed(0)
    model = create_model(name, **fields).eval()
    for key, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            tensor.copy_(torch.rand_like(tensor) + (0.5 if key.endswith("var") else 0.0))
    return model


def official_stvit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write our names and shapes as the official repository does."""
    names = {}
    for name, tensor in state.items():
        official = name.replace("norm.proj.", "proj.").replace("stem.", "patch_embed.").replace("head.fc.", "head.")
        official = re.sub(
            r"^stages\.(\d+)\.downsample\.proj", lambda m: f"layers.{int(m[1]) - 1}.downsample.proj.0", official
        )
        official = re.sub(
            r"^stages\.(\d+)\.downsample\.norm", lambda m: f"layers.{int(m[1]) - 1}.downsample.proj.1", official
        )
        official = official.replace("stages.", "layers.").replace(".mlp.dwconv.", ".mlp2.conv.conv.")
        official = official.replace(".mlp.", ".mlp2.").replace("pos_embed.", "pos_embed.conv.")
        official = official.replace(".norm1.", ".norm1.norm.")
        if ".gamma" in official:
            official, tensor = re.sub(r"ls([12])\.gamma", r"gamma_\1", official), tensor.view(1, -1, 1, 1)
        names[official] = tensor
    for part in ("fold", "unfold"):
        names[f"layers.0.blocks.0.attn.{part}.weights"] = torch.eye(9).view(9, 1, 3, 3)
    return names


def official_van(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write our names as the official repository does."""
    names = {}
    for name, tensor in state.items():
        official = re.sub(r"^norm\.", "norm4.", name).replace("stem.", "patch_embed1.").replace("head.fc.", "head.")
        official = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"patch_embed{int(m[1]) + 1}", official)
        official = re.sub(r"^stages\.(\d)\.norm", lambda m: f"norm{int(m[1]) + 1}", official)
        official = re.sub(r"^stages\.(\d)\.blocks", lambda m: f"block{int(m[1]) + 1}", official)
        names[re.sub(r"ls([12])\.gamma", r"layer_scale_\1", official).replace(".dwconv.", ".dwconv.dwconv.")] = tensor
    return names


@pytest.mark.parametrize(
    ("name", "fields", "rename"), [("stvit_small", STVIT, official_stvit), ("van_b0", VAN, official_van)]
)
def test_official_checkpoints_load(name, fields, rename) -> None:
    model = shaken(name, fields)
    state = rename(model.state_dict())
    assert all(key.startswith("norm.") for key in state.keys() & model.state_dict().keys())
    assert convert(state).keys() == model.state_dict().keys()
    loaded, images = from_official(name, {"state_dict": state}, **fields), torch.randn(2, 3, 40, 56)
    torch.testing.assert_close(loaded(images), model(images))
    state.pop(next(key for key in state if key.endswith(("refine.proj.bias", "proj_2.bias"))))
    with pytest.raises(CheckpointError, match="1 missing"):
        from_official(name, state, **fields)


def test_batch_norm_of_tokens_is_that_of_the_map() -> None:
    torch.manual_seed(0)
    ours, theirs, x = BatchNorm(6), nn.BatchNorm2d(6), torch.randn(3, 4 * 5, 6)
    for _ in range(2):
        expected = theirs(x.transpose(1, 2).unflatten(2, (4, 5))).flatten(2).transpose(1, 2)
        torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x.mT[..., None])[..., 0].mT)


def test_stages_have_options_of_their_own() -> None:
    with torch.device("meta"):
        van, stvit = create_model("van_b0"), create_model("stvit_base")
        mixed = create_model(
            "van_b0", stages=[{"dim": 8, "depth": 1, "num_heads": 1, "ffn": {"name": "mlp", "ratio": 3}}]
        )
    widths = [stage.blocks[0].mlp.fc2.weight.shape[:2] for stage in van.stages]
    assert widths == [(32, 256), (64, 512), (160, 640), (256, 1024)]
    scaled = [hasattr(stage.blocks[-1].ls1, "gamma") for stage in stvit.stages]
    assert scaled == [False, False, True, True]
    assert type(mixed.stages[0].blocks[0].mlp).__name__ == "Mlp"
    assert mixed.stages[0].blocks[0].mlp.fc1.out_features == 24


def test_the_projection_widens_the_feature() -> None:
    model, images = shaken("stvit_small", STVIT), torch.randn(2, 3, 33, 50)
    assert (model.num_features, [info["num_chs"] for info in model.feature_info]) == (16, [8, 12])
    tokens, (first, last) = model.forward_intermediates(images, norm=True)
    assert (first.shape, last.shape) == ((2, 8, 9, 13), (2, 16, 5, 7))
    assert tokens.min() > -0.3  # silu's minimum is -0.278...
    assert create_model("stvit_small", **{**STVIT, "final": "layer_norm"}).num_features == 12


def test_initial_values() -> None:
    torch.manual_seed(0)
    van = create_model("van_b0", num_classes=10)
    stem, block = van.stem.proj, van.stages[3].blocks[0]
    deviations = {
        (2 / (49 * 32)) ** 0.5: stem.weight,
        (2 / 256) ** 0.5: block.attn.proj_1.weight,
        (2 / 49) ** 0.5: block.attn.spatial_gating_unit.conv_spatial.weight,
        0.02: van.head.fc.weight,
    }
    for expected, weight in deviations.items():
        assert weight.std().item() == pytest.approx(expected, rel=0.1)
    assert block.attn.proj_1.bias.abs().max() == 0
    assert block.ls1.gamma.unique().tolist() == pytest.approx([0.01])
    stvit = create_model("stvit_small", **STVIT)
    reach = 12**-0.5  # of a uniform draw, torch's default
    assert 0.8 * reach < stvit.stages[1].blocks[0].attn.stoken_refine.qkv.weight.abs().max() <= reach


def test_unknown_norms_are_named() -> None:
    with pytest.raises(UnknownName, match="did you mean 'batch'"):
        create_model("van_b0", block={"norm2": "bach"})
    with pytest.raises(UnknownName, match="did you mean 'projection'"):
        create_model("stvit_small", final="projektion")
