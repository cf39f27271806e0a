"""Rows of backbones' attention against explicit ones; non-square grids, prefix tokens, windows."""

from __future__ import annotations

import pytest
import timm
import torch

from vislm.analysis.recorder import Recorder
from vislm.analysis.vision import readable, rows_of, watching
from vislm.analysis.vision_record import record_vision
from vislm.attention.neighborhood import NeighborhoodAttention
from vislm.attention.window import WindowAttention
from vislm.backbones.replacing import replace_attention
from vislm.errors import UsageError


def eager_maps(model, images: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of a timm ViT's plain attention."""
    found: list[torch.Tensor] = []

    def look(module, args, output) -> None:
        batch, tokens, _ = args[0].shape
        qkv = module.qkv(args[0]).reshape(batch, tokens, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, _ = qkv
        found.append((module.q_norm(query) * module.scale @ module.k_norm(key).transpose(-1, -2)).softmax(-1))

    hooks = [block.attn.register_forward_hook(look) for block in model.blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_timm_rows_on_a_grid_that_is_not_square(name) -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "num_classes": 3}
    model = timm.create_model(name, img_size=(32, 48), **sizes).eval()
    with torch.no_grad():
        for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            block.attn.qkv.weight.mul_(20)
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    expected, plain, kind = eager_maps(model, images), model(images), type(model.blocks[0].attn)  # pyright: ignore
    with readable(model) as sites:
        found = record_vision(model, sites, images, Recorder("maps"))
    prefix = 5 if "reg4" in name else 1
    for layer, matrix in zip(found.layers, expected, strict=True):
        assert (layer.grid, layer.prefix) == ((4, 6), prefix)
        assert layer.map is not None
        torch.testing.assert_close(layer.map, matrix, atol=1e-5, rtol=1e-4)
        assert layer.prefix_rows is not None
        torch.testing.assert_close(layer.prefix_rows, matrix[:, :, :prefix], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.profile.prefix_mass, matrix[:, :, prefix:, :prefix].sum(-1).mean((0, 2)))
    assert type(model.blocks[0].attn) is kind  # pyright: ignore
    assert torch.equal(model(images), plain)
    assert len(found.activations) == 2


def test_a_table_of_positions_goes_on() -> None:
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", img_size=48, embed_dim=24, depth=1, num_heads=3).eval()
    block = model.blocks[0]  # pyright: ignore
    torch.nn.init.normal_(block.attn.relative_position_bias_table)  # pyright: ignore
    seen = []
    hook = block.attn.register_forward_hook(lambda module, args, output: seen.append((module, args[0])))  # pyright: ignore
    images = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(images)
        hook.remove()
        attention, x = seen[0]
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        qkv = torch.nn.functional.linear(x, attention.qkv.weight, bias).reshape(1, 10, 3, 3, 8).permute(2, 0, 3, 1, 4)
        logits = qkv[0] * attention.scale @ qkv[1].transpose(-1, -2) + attention._get_rel_pos_bias()
        with readable(model) as sites:
            found = record_vision(model, sites, images, Recorder("maps"))
    assert found.layers[0].map is not None
    torch.testing.assert_close(found.layers[0].map, logits.softmax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_windows_give_the_output_of_their_rows(grid, shifted) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(12, 2, 3, shifted=shifted, num_prefix_tokens=1, qkv_bias=False).eval()
    x = torch.randn(2, 1 + grid[0] * grid[1], 12)
    with torch.no_grad():
        rows = rows_of(attention, x, grid).rows(torch.arange(x.shape[1]))
        value = attention.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, -1)).transpose(1, 2)
        mixed = (rows @ value).transpose(1, 2).flatten(2)  # padding has value 0 without a bias
        torch.testing.assert_close(attention.proj(mixed), attention(x, grid), atol=1e-5, rtol=1e-4)
    whole = rows.sum(-1)
    assert whole.max() <= 1 + 1e-5
    assert (grid == (6, 6)) == torch.allclose(whole, torch.ones_like(whole))


def test_neighborhoods_reach_no_further_than_their_window() -> None:
    torch.manual_seed(0)
    attention = NeighborhoodAttention(12, 2, 3, rel_pos_bias=True).eval()
    x = torch.randn(1, 35, 12)
    with torch.no_grad():
        rows = rows_of(attention, x, (5, 7)).rows(torch.arange(35))
        value = attention.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, -1)).transpose(1, 2)
        mixed = attention.proj((rows @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(mixed, attention(x, (5, 7)), atol=1e-5, rtol=1e-4)
    from vislm.analysis.distance import head_profile

    profile = head_profile(rows_of(attention, x, (5, 7)), (5, 7), 0)
    assert profile.hop_strength[:, 3:].abs().max() == 0
    torch.testing.assert_close(profile.hop_strength.sum(-1), torch.ones(2))


def test_what_cannot_be_read_is_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    with replace_attention(model, "agent", agent_num=4) as _:
        with pytest.raises(UsageError, match=r"blocks\.0\.attn is a agent"), readable(model):
            pass
    with pytest.raises(UsageError, match="has no attention"), readable(torch.nn.Linear(2, 2)):
        pass
    with replace_attention(model, "neighborhood", layers=(0, 0), window_size=1):
        with pytest.raises(UsageError, match="mixes"), readable(model):
            pass


def test_hooks_go_when_looking_fails() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def fail(layer, rows) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), readable(model) as sites, watching(sites, fail):
        model(torch.zeros(1, 3, 32, 32))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == before
    with readable(model) as sites, pytest.raises(UsageError, match="the first 1 layers take"):
        record_vision(model, sites, torch.zeros(1, 3, 32, 32), Recorder("maps", limit=10))
