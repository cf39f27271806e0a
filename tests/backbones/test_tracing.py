"""One backbone of each family, compiled and exported."""

from __future__ import annotations

import pytest
import torch

import vislm
from vislm.backbones import list_models, variant

pytestmark = pytest.mark.filterwarnings("ignore:.* agents on a map of:UserWarning")

FAMILIES = {variant(name).path.parent.name: name for name in reversed(list_models())}


@pytest.fixture(autouse=True)
def fresh():
    """Forget what was compiled."""
    torch.compiler.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_for_any_batch(small, family) -> None:
    torch.manual_seed(0)
    model = small(FAMILIES[family]).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: batch},))
    images = torch.randn(3, 3, 64, 96)
    torch.testing.assert_close(program.module()(images), model(images), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_in_one_graph(small, family) -> None:
    torch.manual_seed(0)
    model = small(FAMILIES[family]).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for function in (model, compiled):
        model.zero_grad()
        logits = function(images)
        logits.square().sum().backward()
        gradients.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for expected, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


def test_exported_programs_are_saved_and_loaded(small, tmp_path) -> None:
    torch.manual_seed(0)
    model, images = small("nat_tiny").eval(), torch.randn(1, 3, 64, 64)
    torch.export.save(torch.export.export(model, (images,)), tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(images), model(images))


@pytest.mark.slow
def test_a_replaced_attention_compiles_and_exports() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 64}
    model = timm.create_model("vit_small_patch16_dinov3", **sizes).eval()
    vislm.replace_attention(model, "neighborhood", window_size=3)
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    torch.testing.assert_close(torch.compile(model, backend="eager")(images), expected)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), expected)
