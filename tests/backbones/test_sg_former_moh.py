"""SG-Former and MoH-ViT as backbones: official names, the map between blocks, shares of heads, losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vislm.attention.head_routing import head_routings, load_balance_losses
from vislm.backbones import create_model, from_official
from vislm.backbones.hierarchical import Stage
from vislm.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
RELAYED = [{"name": "hybrid_scale", "sr_ratio": 2}, {"name": "self_guided", "sr_ratio": 2}]
SG_FORMER = {
    "stem": {"input_size": 56},
    "stages": [
        {"dim": 8, "depth": 2, "num_heads": 2, "ffn": {"ratio": 2}, "blocks": RELAYED},
        {"dim": 8, "depth": 2, "num_heads": 2, "ffn": {"ratio": 2}},
        {"dim": 12, "depth": 1, "num_heads": 2, "ffn": {"ratio": 2}},
        {"dim": 16, "depth": 1, "num_heads": 2, "ffn": {"ratio": 2}},
    ],
}
MOH_VIT = {
    "ffn": {"ratio": 3},
    "stages": [
        {"dim": dim, "depth": 1, "num_heads": heads, "blocks": [options]}
        for dim, heads, options in (
            (8, 2, {"shared_heads": 2, "routed_heads": 0, "pretrained_grid": 16, "sr_ratio": 4}),
            (8, 2, {"shared_heads": 1, "routed_heads": 1, "pretrained_grid": 8, "sr_ratio": 2}),
            (8, 4, {"shared_heads": 2, "routed_heads": 1, "pretrained_grid": 4, "sr_ratio": 2}),
            (16, 4, {"name": "moh_cosine", "shared_heads": 1, "routed_heads": 2, "pretrained_grid": 2}),
        )
    ],
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "case", "overrides"),
    [
        ("sg_former_small", "sg_former/backbone", SG_FORMER),
        ("moh_vit_small_80", "moh/vit_backbone", MOH_VIT),
    ],
)
def test_official_checkpoints_load(name, case, overrides) -> None:
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    state = {key.removeprefix("param."): tensor for key, tensor in tensors.items() if key.startswith("param.")}
    model = from_official(name, {"model": state}, num_classes=5, **overrides)
    torch.testing.assert_close(model(tensors["in.x"]), tensors["out.logits"], atol=1e-4, rtol=1e-4)
    key = next(key for key in state if key.endswith("attn.proj.bias"))
    state[key.replace("proj", "prooj")] = state.pop(key)
    with pytest.raises(CheckpointError, match=r"attn\.proj\.bias +near to .*prooj"):
        from_official(name, state, num_classes=5, **overrides)


def relaying_stage(depth: int) -> Stage:
    torch.manual_seed(0)
    stages = [{"dim": 8, "depth": depth, "num_heads": 2, "blocks": RELAYED}]
    return create_model("sg_former_small", stages=stages, downsample=None, drop_path_rate=0.0).stages[0].eval()


def test_each_pair_of_blocks_has_its_own_map() -> None:
    stage, x = relaying_stage(4), torch.randn(2, 70, 8)
    ours, _ = stage(x, (7, 10))
    expected, maps = x, []
    for first, second in ((0, 1), (2, 3)):
        expected, significance = stage.blocks[first](expected, (7, 10))
        maps.append(significance)
        expected, rest = stage.blocks[second](expected, (7, 10), significance)
        assert rest is None
    torch.testing.assert_close(ours, expected)
    assert not torch.allclose(*maps)
    other, _ = stage.blocks[1](x, (7, 10), maps[0])
    swapped, _ = stage.blocks[1](x, (7, 10), maps[0].flip(1))
    assert not torch.allclose(other, swapped)


def test_the_map_of_an_odd_block_ends_with_its_stage() -> None:
    x = torch.randn(1, 70, 8)
    whole, _ = relaying_stage(3)(x, (7, 10))
    assert whole.shape == x.shape
    stages = [{"dim": 8, "depth": 3, "num_heads": 2, "blocks": RELAYED}, {"dim": 8, "depth": 1, "num_heads": 2}]
    assert create_model("sg_former_small", stages=stages, num_classes=3)(torch.randn(1, 3, 40, 60)).shape == (1, 3)


def test_checkpointed_blocks_hand_the_map_on() -> None:
    stage, x = relaying_stage(4).train(), torch.randn(2, 70, 8)
    gradients = []
    for recompute in (False, True):
        stage.zero_grad()
        stage.grad_checkpointing = recompute
        stage(x, (7, 10))[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in stage.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("name", "used", "heads", "routed_layers"),
    [
        ("moh_vit_small_80", 343, 429, 27),
        ("moh_vit_small_75", 323, 429, 27),
        ("moh_vit_base_75", 441, 588, 28),
        ("moh_vit_base_50", 294, 588, 38),
    ],
)
def test_shares_of_heads_in_use(name, used, heads, routed_layers) -> None:
    with torch.device("meta"):
        model = create_model(name)
    routers = [module.router for key, module in model.named_modules() if key.endswith(".attn")]
    assert sum(router.shared_heads + router.routed_heads for router in routers) == used
    assert sum(router.num_heads for router in routers) == heads
    assert sum(router.routed_heads > 0 for router in routers) == routed_layers


def test_losses_of_a_backbone_with_and_without_checkpointing(small) -> None:
    torch.manual_seed(0)
    model, images = small("moh_vit_base_50"), torch.randn(2, 3, 64, 64)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(recompute)
        with head_routings(model) as routings:
            logits = model(images)
        losses = load_balance_losses(routings)
        assert losses.shape == (4,)
        (logits.square().sum() + 0.01 * losses.mean()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_features_are_normalised_at_every_stage(small) -> None:
    torch.manual_seed(0)
    for name in ("sg_former_base", "moh_vit_small_75"):
        features = small(name).eval().forward_intermediates(torch.randn(1, 3, 64, 64), [0, 2], intermediates_only=True)
        for feature in features:
            torch.testing.assert_close(feature.mean(dim=1), torch.zeros_like(feature[:, 0]), atol=1e-4, rtol=0)


def test_what_takes_no_weight_decay(small) -> None:
    assert small("sg_former_small").no_weight_decay() == {"stem.pos_embed"}
    names = small("moh_vit_small_80").no_weight_decay()
    assert {"stages.0.blocks.0.attn.query_embedding", "stages.3.blocks.0.attn.cpb_fc2.bias"} <= names
    assert not any("router" in name or "learnable" in name for name in names)
