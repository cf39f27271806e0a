"""The plain skeleton: timm's VisionTransformer with the same weights, and any attention in it."""

from __future__ import annotations

import pytest
import torch

from vislm.backbones import ViTConfig, build, create_model, register_timm
from vislm.backbones.official import convert
from vislm.backbones.weights import load_state
from vislm.errors import UnknownName, UsageError

timm = pytest.importorskip("timm")

SIZES = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5, "img_size": 32}
CASES = {
    "class token": ({}, {}),
    "registers": ({"reg_tokens": 3}, {"num_registers": 3}),
    "no positions for the prefix": (
        {"reg_tokens": 2, "no_embed_class": True},
        {"num_registers": 2, "embed_prefix": False},
    ),
    "mean": (
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"class_token": False, "global_pool": "avg"},
    ),
    "layer scale, no positions": ({"init_values": 0.1, "pos_embed": "none"}, {"layer_scale": 0.1, "pos_embed": None}),
}


def pair(theirs, ours):
    """Return timm's model and ours with the same random weights."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**{**SIZES, "dynamic_img_size": True, **theirs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    stem = {"name": "patch", "patch_size": 8, "norm": False}
    config = ViTConfig(
        **{"dim": 16, "depth": 3, "num_heads": 2, "stem": stem, "pos_embed": 4, "num_classes": 5, **ours}
    )
    mine = build(config).eval()
    load_state(mine, convert(model.state_dict()), "timm")
    return model, mine


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(32, 32), (24, 56)])
def test_equals_timm(case, size) -> None:
    theirs, ours = pair(*CASES[case])
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)
    expected, features = theirs.forward_intermediates(images, [0, 2], norm=True, return_prefix_tokens=True)
    tokens, found = ours.forward_intermediates(images, [0, 2], norm=True, return_prefix_tokens=True)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, features, atol=1e-4, rtol=1e-4)
    plain = ours.forward_intermediates(images, [-2], output_fmt="NLC", intermediates_only=True, stop_early=True)
    other = theirs.forward_intermediates(images, [1], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(plain, other, atol=1e-4, rtol=1e-4)


def test_images_of_any_size() -> None:
    model = build(ViTConfig(dim=8, depth=1, num_heads=2, num_classes=0, pos_embed=3)).eval()
    assert model(torch.randn(1, 3, 50, 33)).shape == (1, 8)
    images = torch.zeros(1, 3, 64, 48)
    images[:, :, :50, :33] = torch.randn(1, 3, 50, 33)
    torch.testing.assert_close(model(images[:, :, :50, :33]), model(images))


def test_reading_the_mean_of_the_patches() -> None:
    torch.manual_seed(0)
    model = build(ViTConfig(dim=8, depth=1, num_heads=2, num_classes=4, pos_embed=2, num_registers=1)).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    model.reset_classifier(3, "avg")
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 2:].mean(dim=1))
    assert model(images).shape == (2, 3)
    model.reset_classifier(0)
    assert model.global_pool == "avg"
    model.reset_classifier(2, "token")
    assert model(images).shape == (2, 2)
    with pytest.raises(UsageError, match="expected 'avg', or 'token'"):
        model.reset_classifier(3, "max")


def test_only_the_blocks_wanted_are_kept() -> None:
    torch.manual_seed(0)
    model = build(ViTConfig(dim=8, depth=4, num_heads=2, num_classes=4, pos_embed=2)).eval()
    images = torch.randn(1, 3, 32, 32)
    before = model.forward_intermediates(images, [1], intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.blocks) == 2
    torch.testing.assert_close(model.forward_intermediates(images, [1], intermediates_only=True), before)
    with pytest.raises(UsageError, match="from 0 to 1"):
        model.forward_intermediates(images, [2])
    with pytest.raises(UnknownName, match="did you mean 'NLC'"):
        model.forward_intermediates(images, output_fmt="NCL")


def test_prefix_tokens_and_tables_take_no_weight_decay() -> None:
    model = create_model("agent_deit_tiny", dim=8, num_heads=2, depth=1, num_registers=1)
    names = model.no_weight_decay()
    assert {"cls_token", "reg_token", "pos_embed", "blocks.0.attn.ca_bias"} <= names
    assert not any(name.endswith("weight") for name in names)


def test_macs_count_the_prefix() -> None:
    config = ViTConfig(dim=16, depth=2, num_heads=2, num_classes=10, num_registers=2)
    tokens, dim = 3 + 4 * 5, 16
    block = 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * tokens * dim * 4 * dim
    assert build(config).macs((64, 80)) == 20 * 3 * 256 * dim + 2 * block + dim * 10


def test_blocks_are_computed_again_for_their_gradients() -> None:
    torch.manual_seed(0)
    model = create_model("agent_deit_tiny", dim=8, num_heads=2, depth=2)
    images, gradients = torch.randn(1, 3, 112, 112), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


class Bare(torch.nn.Linear):
    """An "attention" that has no place for class tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, dim)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return super().forward(x)


def test_any_attention_fits() -> None:
    for mixer in (
        {"name": "neighborhood", "window_size": 3},
        {"name": "window", "window_size": 2},
        {"name": "agent"},
        {"name": "agent_cswin"},
        {"name": "moh_aggregated"},
        {"name": "sigmoid", "bias": "-log_n_current"},
    ):
        config = ViTConfig(dim=8, depth=2, num_heads=2, mixer=mixer, pos_embed=2, num_classes=3, num_registers=1)
        model = build(config)
        assert model.blocks[1].attn.num_prefix_tokens == 2
        model(torch.randn(1, 3, 112, 112)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(UnknownName, match="'num_prefix_tokens'"):
        build(ViTConfig(dim=8, depth=1, num_heads=2, mixer={"name": Bare}))
    bare = ViTConfig(dim=8, depth=1, num_heads=2, mixer={"name": Bare}, class_token=False, global_pool="avg")
    assert build(bare)(torch.randn(1, 3, 112, 112)).shape == (1, 1000)
    with pytest.raises(UsageError, match="reads the class token"):
        build(ViTConfig(dim=8, depth=1, num_heads=2, class_token=False))


def test_timm_knows_them() -> None:
    register_timm()
    model = timm.create_model("agent_deit_tiny", dim=8, num_heads=2, depth=3, features_only=True, out_indices=(0, 2))
    assert [tuple(feature.shape) for feature in model(torch.randn(1, 3, 112, 128))] == [(1, 8, 7, 8)] * 2
    assert model.feature_info.reduction() == [16, 16]
    assert timm.get_pretrained_cfg("agent_deit_small_448").input_size == (3, 448, 448)
