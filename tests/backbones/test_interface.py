"""What every backbone must do: any resolution, gradients everywhere, features, batches, half precision, round trips.

Widths and depths are those of ``conftest.small``: every part of every variant, 4 channels a head. The full sizes are
built in ``test_published``, without memory.
"""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vislm.backbones import create_model, list_models
from vislm.backbones.weights import load_file, load_state
from vislm.errors import CheckpointError, UnknownName, UsageError

# At these sizes some models have more agents than tokens.
pytestmark = pytest.mark.filterwarnings("ignore:.* agents on a map of:UserWarning")

NAMES = list_models()
SIZES = [(64, 64), (50, 78)]


class Kept:
    """Counts the numbers that a forward pass keeps for the backward pass."""

    def __init__(self) -> None:
        self.numbers = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.numbers += tensor.numel()
        return tensor


@pytest.mark.parametrize("name", NAMES)
def test_any_resolution_and_gradients_everywhere(small, name) -> None:
    torch.manual_seed(0)
    model = small(name)
    for size in SIZES:
        model.zero_grad()
        logits = model(torch.randn(2, 3, *size))
        assert logits.shape == (2, 5)
        logits.square().sum().backward()
        lacking = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert lacking == []
        assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_features_of_every_stage(small, name) -> None:
    torch.manual_seed(0)
    model = small(name).eval()
    images = torch.randn(1, 3, 50, 78)
    tokens, features = model.forward_intermediates(images)
    for info, feature in zip(model.feature_info, features, strict=True):
        sides = tuple(math.ceil(side / info["reduction"]) for side in (50, 78))
        assert feature.shape == (1, info["num_chs"], *sides)
    prefix = model.num_prefix_tokens
    assert tokens.shape == (1, prefix + features[-1][0, 0].numel(), model.num_features)
    torch.testing.assert_close(model.forward_head(tokens), model(images))
    (last,) = model.forward_intermediates(images, [-1], norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(last, tokens[:, prefix:])


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_samples(small, name) -> None:
    torch.manual_seed(0)
    model, images = small(name).eval(), torch.randn(2, 3, 64, 96)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(small, name) -> None:
    torch.manual_seed(0)
    model, images = small(name).eval(), torch.randn(1, 3, 64, 96)
    expected = model(images)
    ours = model.bfloat16()(images.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_weights_make_a_round_trip(small, name, tmp_path) -> None:
    torch.manual_seed(0)
    first, second = small(name).eval(), small(name).eval()
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    load_file(second, tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(second(images), first(images))


@pytest.mark.parametrize(
    "name",
    [
        "nat_tiny",
        "dinat_s_tiny",
        "halonet_h3",
        "dinat_isotropic_small",
        "stvit_base",
        "van_b0",
        "agent_deit_base",
        "agent_pvt_tiny",
        "agent_swin_base",
        "agent_cswin_tiny",
        "sg_former_small",
        "moh_vit_base_50",
    ],
)
class TestOneOfEachFamily:
    def test_drop_path_drops_whole_samples(self, small, name) -> None:
        torch.manual_seed(0)
        model = small(name)
        for module in model.modules():
            if type(module).__name__ == "DropPath":
                module.rate = 1.0 - 1e-9
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        images = torch.randn(2, 3, 64, 64)
        dropped = model(images)
        for key, parameter in model.named_parameters():
            if ".attn." in key or "self_attn" in key or ".mlp." in key:
                parameter.data.normal_()
        torch.testing.assert_close(model(images), dropped)

    def test_gradient_checkpointing_computes_the_same(self, small, name) -> None:
        torch.manual_seed(0)
        model, images, gradients = small(name), torch.randn(1, 3, 64, 64), []
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            kept = Kept()
            with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
                logits = model(images)
            logits.square().sum().backward()
            gradients.append(([parameter.grad.clone() for parameter in model.parameters()], kept.numbers))
        (expected, whole), (ours, less) = gradients
        torch.testing.assert_close(ours, expected)
        assert less < 0.6 * whole

    def test_classifiers_are_replaced(self, small, name) -> None:
        model, images = small(name).eval(), torch.randn(1, 3, 64, 64)
        assert model.get_classifier().out_features == 5
        model.reset_classifier(7)
        assert model(images).shape == (1, 7)
        model.reset_classifier(0)
        torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images), pre_logits=True))
        with pytest.raises(UsageError, match="expected 'avg'"):
            model.reset_classifier(3, "max")

    def test_only_the_stages_wanted_are_computed(self, small, name) -> None:
        model, images = small(name).eval(), torch.randn(1, 3, 64, 64)
        first = model.forward_intermediates(images, [0], stop_early=True, intermediates_only=True)[0]
        assert model.prune_intermediate_layers([0]) == [0]
        assert len(model.levels) == 1
        torch.testing.assert_close(model.forward_intermediates(images, [0], intermediates_only=True)[0], first)


def test_relative_tables_take_no_weight_decay(small) -> None:
    names = small("nat_tiny").no_weight_decay()
    assert "stages.0.blocks.0.attn.rpb" in names
    assert all(name.endswith("rpb") for name in names)
    assert len(names) == 4


def test_bad_requests_for_features(small) -> None:
    model, images = small("nat_tiny"), torch.randn(1, 3, 32, 32)
    with pytest.raises(UsageError, match="stages from 0 to 3"):
        model.forward_intermediates(images, [4])
    with pytest.raises(UsageError, match="last 4"):
        model.forward_intermediates(images, 5)
    with pytest.raises(UnknownName, match="did you mean 'NCHW'"):
        model.forward_intermediates(images, output_fmt="NCWH")


def test_weights_that_do_not_fit_are_named(small, tmp_path) -> None:
    model = small("nat_tiny")
    state = dict(model.state_dict())
    state["stages.0.blocks.0.attn.rbp"] = state.pop("stages.0.blocks.0.attn.rpb")
    state["head.fc.bias"] = torch.zeros(3)
    before = model.head.fc.weight.clone()
    state["head.fc.weight"] = before + 1
    with pytest.raises(CheckpointError) as error:
        load_state(model, state, "these weights")
    message = str(error.value)
    assert "1 missing" in message
    assert "rpb  near to stages.0.blocks.0.attn.rbp" in message
    assert "head.fc.bias  (3,), expected (5,)" in message
    assert torch.equal(model.head.fc.weight, before)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot read"):
        create_model("nat_mini", weights=tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "nat_small",
        "dinat_s_tiny",
        "vit_rpb_small",
        "halonet_h5",
        "halonet_h7",
        "stvit_base",
        "van_b0",
        "agent_deit_base",
        "agent_pvt_tiny",
        "agent_swin_base",
        "agent_cswin_tiny",
        "sg_former_small",
        "moh_vit_base_50",
    ],
)
def test_multiply_adds_are_those_of_the_layers_that_ran(small, name) -> None:
    model, counted = small(name).eval(), []

    def count(module, inputs, output) -> None:
        positions = output.numel() // output.shape[1 if output.ndim == 4 else -1]
        counted.append(module.weight.numel() * positions)

    def attention(module, inputs, output) -> None:
        counted.append(module.macs(inputs[1]))

    for key, module in model.named_modules():
        if key.endswith("attn") and hasattr(module, "macs"):
            module.register_forward_hook(attention)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and "attn." not in key:
            module.register_forward_hook(count)
    model(torch.randn(1, 3, 50, 78))
    assert model.macs((50, 78)) == sum(counted)
