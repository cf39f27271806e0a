"""The authors' checkpoints load under their own names; with the right classes they give the same model."""

from __future__ import annotations

import re

import pytest
import torch

from vislm.backbones import create_model, from_official
from vislm.backbones.official import convert
from vislm.backbones.weights import load_state
from vislm.errors import CheckpointError

SMALL = {
    "stages": [
        {"dim": 8, "depth": 2, "num_heads": 2},
        {"dim": 16, "depth": 1, "num_heads": 2},
    ],
    "num_classes": 3,
    "layer_scale": 0.5,
}


def official_names(state: dict[str, torch.Tensor], levels: str) -> dict[str, torch.Tensor]:
    """Write our names as the official repository does."""
    names = {}
    for name, tensor in state.items():
        name = re.sub(
            r"^stages\.(\d+)\.downsample", lambda match: f"{levels}.{int(match[1]) - 1}.downsample", name
        ).replace("stages.", f"{levels}.")
        name = re.sub(r"ls([12])\.gamma", r"gamma\1", name)
        names[name.replace("stem.", "patch_embed.").replace("head.fc.", "head.")] = tensor
    return names


@pytest.mark.parametrize(("name", "levels"), [("nat_tiny", "levels"), ("dinat_s_tiny", "layers")])
@pytest.mark.parametrize("wrapped", [None, "model", "state_dict"])
def test_official_checkpoints_load(name, levels, wrapped) -> None:
    torch.manual_seed(0)
    model = create_model(name, **SMALL).eval()
    state = official_names(model.state_dict(), levels)
    assert not set(state) & {"head.fc.weight", "stem.norm.weight"}
    assert convert(state).keys() == model.state_dict().keys()
    if wrapped is not None:
        state = {wrapped: {f"module.{key}": tensor for key, tensor in state.items()}, "epoch": 300}
    loaded = from_official(name, state, **SMALL)
    images = torch.randn(1, 3, 40, 56)
    torch.testing.assert_close(loaded(images), model(images))


def test_timms_halonet_loads() -> None:
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model("halonet_h1", num_classes=5).double()  # random weights amplify rounding a lot
    with torch.no_grad():
        for norm in theirs.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.running_var.uniform_(0.5, 1.5)
                norm.running_mean.normal_(0, 0.1)
    ours = create_model("halonet_h1", num_classes=5).double().eval()
    load_state(ours, convert(theirs.state_dict()), "timm")
    images = torch.randn(1, 3, 256, 256, dtype=torch.float64)
    with torch.no_grad():
        expected, logits = theirs.eval()(images), ours(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


def test_other_checkpoints_are_refused_with_the_nearest_names() -> None:
    state = create_model("nat_tiny", **SMALL).state_dict()
    state["stages.0.blocks.0.atn.rpb"] = state.pop("stages.0.blocks.0.attn.rpb")
    with pytest.raises(CheckpointError, match=r"near to stages\.0\.blocks\.0\.atn\.rpb"):
        from_official("nat_tiny", state, **SMALL)
    with pytest.raises(CheckpointError, match=r"head\.fc\.bias  \(3,\), expected \(1000,\)"):
        from_official("nat_tiny", create_model("nat_tiny", num_classes=3).state_dict())
