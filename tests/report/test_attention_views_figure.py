"""From a model and a picture to a sheet: finding layers, stopping there, drawing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import vislm
from vislm.attention.tokens import split_heads
from vislm.backbones.replacing import AttentionSite
from vislm.errors import CheckpointError, ImageError, UnknownName, UsageError
from vislm.report.attention_views import Layer, Panel, at_layer, find_layer, panels_of
from vislm.report.attention_views.dense import dense_row
from vislm.report.attention_views.drawing import _EDGE, _HEAD, _SIDE, draw_sheet
from vislm.report.attention_views.figure import attention_figure, query_place
from vislm.report.attention_views.loading import Backbone, load_backbone
from vislm.report.attention_views.painting import CLASSES, DPI, QUERY, cell
from vislm.report.attention_views.panel import Sheet

TINY = """
skeleton: hierarchical
published: {source: none, params: 0, input_size: 64}
model:
  stem: conv
  downsample: conv
  mixer: {name: neighborhood, window_size: 3, small_input: pad}
  ffn: {name: mlp, ratio: 1}
  num_classes: 2
  stages:
    - {dim: 8, depth: 2, num_heads: 2}
    - {dim: 16, depth: 1, num_heads: 4}
"""


@pytest.fixture
def tiny(tmp_path) -> Backbone:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return load_backbone(str(path))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, window_size=4, embed_dim=8, depths=(2,), num_heads=(2,)
    ).eval()


def test_layers_by_stage_and_block(tiny) -> None:
    def path(**numbers) -> str:
        return find_layer(tiny.model, **numbers).path

    assert path() == "stages.0.blocks.0.attn"
    assert path(block=-1) == "stages.0.blocks.1.attn"
    assert path(stage=-1) == path(stage=1, block=0) == "stages.1.blocks.0.attn"
    with pytest.raises(UsageError, match=r"block=2, expected one of 0, 1; there are stages.0.blocks.0.attn \(neigh"):
        path(stage=0, block=2)
    with pytest.raises(UsageError, match=r"stage=-3, expected one of 0, 1"):
        path(stage=-3)


def test_layers_without_stages() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=12, num_heads=2)
    assert find_layer(model, block=-1).path == "blocks.1.attn"
    with pytest.raises(UsageError, match="has no stages; give the block alone"):
        find_layer(model, stage=0)
    with pytest.raises(UsageError, match="Linear has no attention to draw"):
        find_layer(nn.Linear(2, 2))


def test_the_pass_stops_at_the_layer(tiny) -> None:
    calls = []
    for block in (*tiny.model.stages[0].blocks, *tiny.model.stages[1].blocks):
        block.attn.register_forward_pre_hook(lambda module, args: calls.append(module))
    site = find_layer(tiny.model, block=1)
    seen = at_layer(tiny.model, torch.randn(1, 3, 32, 48), site, lambda layer: layer)
    assert seen.grid == (8, 12)
    assert seen.x.shape == (1, 96, 8)
    assert calls == [block.attn for block in tiny.model.stages[0].blocks]
    assert not any(block.attn._forward_hooks for block in tiny.model.stages[0].blocks)
    tiny.model(torch.randn(1, 3, 32, 48))  # runs through again


def test_looking_may_call_the_module(tiny) -> None:
    site = find_layer(tiny.model)
    images = torch.randn(1, 3, 32, 32)
    again = at_layer(tiny.model, images, site, lambda layer: layer.attention(layer.x, layer.grid))
    assert again.shape == (1, 64, 8)


def test_layers_that_take_no_part(tiny) -> None:
    tiny.model.extra = nn.ModuleDict({"0": vislm.create_model("nat_mini").stages[0].blocks[0].attn})
    site = AttentionSite("extra.0", "neighborhood", "", False)
    with pytest.raises(UsageError, match=r"extra\.0 takes no part"):
        at_layer(tiny.model, torch.randn(1, 3, 32, 32), site, lambda layer: layer)


def gives_back(module: nn.Module, layer: Layer, place: tuple[int, int], theirs: torch.Tensor) -> None:
    """The weights drawn, times the values, are what the original attention made."""
    row = dense_row(layer, place)
    value = split_heads(layer.attention.qkv(layer.x).chunk(3, dim=-1)[2], layer.attention.num_heads)[0]
    weights = torch.from_numpy(row.weights).float().flatten(1)
    prefix = torch.from_numpy(row.beside).float()
    assert layer.num_prefix == 1
    mixed = torch.einsum("hn,hnd->hd", weights, value[:, 1:]) + prefix[:, None] * value[:, 0]
    torch.testing.assert_close(module.proj(mixed.flatten()), theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_plain_attention_of_timm(name) -> None:
    """Rotary positions (EVA-02) are those of the forward pass."""
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, embed_dim=24, num_heads=2).eval()
    images, theirs = torch.randn(1, 3, 224, 224), []
    original = model.blocks[1].attn
    hook = original.register_forward_hook(lambda module, args, out: theirs.append(out[0]))
    with torch.no_grad():
        model(images)
    hook.remove()

    def look(layer: Layer) -> None:
        gives_back(original, layer, (3, 5), theirs[0][layer.token((3, 5))])

    at_layer(model, images, find_layer(model, block=1), look)
    assert model.blocks[1].attn is original


def test_replaced_attention() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2).eval()
    vislm.replace_attention(model, "agent", layers=(1, 1), agent_num=4)
    panels = at_layer(
        model, torch.randn(1, 3, 224, 224), find_layer(model, block=1), lambda seen: panels_of(seen, (0, 0))
    )
    assert [panel.title for panel in panels][1:] == ["query to agents", "agents to patches", "query to patches"]


@pytest.mark.parametrize("block", [0, 1])
def test_windows_of_timm(block) -> None:
    model, images, theirs = swin(), torch.randn(1, 3, 56, 56), []
    module = model.layers[0].blocks[block]
    hook = module.norm2.register_forward_pre_hook(lambda norm, args: theirs.append(args[0]))
    into = []
    module.register_forward_pre_hook(lambda norm, args: into.append(args[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    ours = at_layer(model, images, find_layer(model, 0, block), lambda seen: seen.attention(seen.x, seen.grid))
    torch.testing.assert_close(into[0].flatten(1, 2) + ours, theirs[0], atol=1e-5, rtol=1e-4)


def test_halos_of_timm() -> None:
    torch.manual_seed(0)
    model = timm.create_model("halonet26t").eval()
    site, images, theirs = find_layer(model), torch.randn(1, 3, 256, 256), []
    hook = model.get_submodule(site.path).register_forward_hook(lambda module, args, out: theirs.append(out))
    with torch.no_grad():
        model(images)
    hook.remove()
    ours = at_layer(model, images, site, lambda seen: seen.attention(seen.x, seen.grid))
    torch.testing.assert_close(ours, theirs[0].flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_attentions_of_timm_without_a_picture() -> None:
    model = timm.create_model("swinv2_tiny_window8_256", embed_dim=24, depths=(1,), num_heads=(1,))
    with pytest.raises(UsageError, match=r"swin_transformer_v2.WindowAttention, which has no picture; vislm's agent"):
        at_layer(model, torch.randn(1, 3, 256, 256), find_layer(model), lambda layer: layer)
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2)
    with pytest.raises(UsageError, match="biases of relative position"):
        at_layer(beit, torch.randn(1, 3, 224, 224), find_layer(beit), lambda layer: layer)


@pytest.mark.parametrize(
    ("query", "place"),
    [("0,0", (0, 0)), (" 5 , 11", (5, 11)), ("0%,100%", (0, 11)), ("50%,50%", (3, 6)), ("99.9%, 8.4%", (5, 1))],
)
def test_queries(query, place) -> None:
    assert query_place(query, (6, 12)) == place


@pytest.mark.parametrize("query", ["", "3", "1,2,3", "-1,2", "a,b", "50%,3", "101%,0%", "1.5,2"])
def test_queries_that_are_none(query) -> None:
    with pytest.raises(UsageError, match="expected row and column of a patch, such as 4,7"):
        query_place(query, (6, 12))


@pytest.mark.parametrize("query", ["6,0", "0,12"])
def test_queries_outside(query) -> None:
    with pytest.raises(UsageError, match="outside of the grid of 6 x 12 patches; rows count from 0 to 5, columns from"):
        query_place(query, (6, 12))


@pytest.mark.parametrize(
    ("picture", "sides"),
    [((300, 300), (224, 224)), ((1000, 500), (448, 224)), ((500, 620), (224, 288)), ((10, 9000), (224, 1792))],
)
def test_a_picture_keeps_its_shape(picture, sides) -> None:
    free = Backbone(nn.Identity(), "", True, (224, 224), True, (0.0,) * 3, (1.0,) * 3)
    assert free.sides(picture) == sides
    fixed = Backbone(nn.Identity(), "", True, (224, 192), False, (0.0,) * 3, (1.0,) * 3)
    assert fixed.sides(picture) == (224, 192)


def test_colours_are_normalised() -> None:
    backbone = Backbone(nn.Identity(), "", True, (2, 2), True, (0.5, 0.5, 0.0), (0.5, 1.0, 1.0))
    pixels = torch.tensor([255.0, 127.5, 51.0]).expand(2, 4, 3)
    made = backbone.normalized(pixels)
    assert made.shape == (1, 3, 2, 4)
    assert made[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_random_weights_follow_the_seed_alone(tiny, tmp_path) -> None:
    path = str(tmp_path / "tiny.yaml")
    state = torch.get_rng_state()
    same, other = load_backbone(path), load_backbone(path, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    key = "stages.0.blocks.0.attn.qkv.weight"
    first = tiny.model.state_dict()[key]
    assert torch.equal(same.model.state_dict()[key], first)
    assert not torch.equal(other.model.state_dict()[key], first)
    assert not tiny.trained


def test_weights_from_a_file(tiny, tmp_path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({name: torch.full_like(tensor, 0.25) for name, tensor in tiny.model.state_dict().items()}, file)
    loaded = load_backbone(str(tmp_path / "tiny.yaml"), weights=file)
    assert loaded.trained
    assert (loaded.model.state_dict()["stem.norm.weight"] == 0.25).all()
    with pytest.raises(CheckpointError, match="cannot read"):
        load_backbone("vit_tiny_patch16_224", weights=tmp_path / "none.safetensors")


def test_models_of_timm(tmp_path) -> None:
    model = load_backbone("vit_tiny_patch16_224", size=(96, 64))
    assert model.sides((500, 500)) == (96, 64)
    assert model.model.patch_embed.grid_size == (6, 4)
    assert not model.trained
    assert list(model.mean) == [0.5, 0.5, 0.5]


def test_folders_of_timm(tmp_path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2)
    timm.models.save_for_hf(model, tmp_path, model_args={"depth": 1, "embed_dim": 24, "num_heads": 2})
    loaded = load_backbone(str(tmp_path))
    assert loaded.trained
    assert torch.equal(loaded.model.state_dict()["head.weight"], model.state_dict()["head.weight"])


def test_models_that_there_are_not(tiny, tmp_path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'nat_mini'"):
        load_backbone("nat_mni")
    with pytest.raises(UsageError, match="has no weights to download"):
        load_backbone("nat_mini", pretrained=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="timm cannot make local-dir:"):
        load_backbone(str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="timm cannot make swin_tiny"):
        load_backbone("swin_tiny_patch4_window7_224", size=(225, 3))


def test_a_figure(tiny, tmp_path) -> None:
    out = attention_figure(tiny, noise(90, 60), tmp_path / "new" / "a.png", queries=("1,2", "7,11"))
    with Image.open(out) as picture:
        assert picture.mode == "P"
        assert picture.width > 700
        assert picture.height > 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": ()}, "give at least one"),
        ({"queries": ("16,0",)}, "outside of the grid of 16 x 16"),
        ({"stage": 5}, "stage=5"),
        ({"heads": (2,)}, "head 2, expected a number from 0 to 1"),
    ],
)
def test_figures_that_there_are_not(tiny, options, message, tmp_path) -> None:
    with pytest.raises(UsageError, match=message):
        attention_figure(tiny, noise(64, 64), tmp_path / "a.png", **options)
    assert not list(tmp_path.glob("*.png"))


def test_pictures_that_cannot_be_read(tiny, tmp_path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        attention_figure(tiny, tmp_path / "none.jpg", tmp_path / "a.png")


def sheet(panel: Panel, grid: tuple[int, int], size: tuple[int, int], place: tuple[int, int] = (0, 0)) -> Sheet:
    return Sheet("title", "subtitle", Image.new("RGB", size, "white"), grid, [(place, [panel])])


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def inside(size: tuple[int, int]) -> tuple[slice, slice]:
    """Return where the only panel's picture of that size is, below a line each of title and subtitle."""
    wide, tall = (round(_SIDE * DPI * side / max(size)) for side in size)
    top, left = round((_EDGE + 0.5 + _HEAD) * DPI), round(_EDGE * DPI)
    return slice(top, top + tall), slice(left, left + wide)


def test_values_stand_where_they_belong(tmp_path) -> None:
    values = np.full((2, 4), np.nan)
    values[0, 1], values[1, 3] = 0.0, 1.0
    drawn = pixels(draw_sheet(sheet(Panel("a", "b", values, "unit"), (2, 4), (200, 100), (1, 0)), tmp_path / "a.png"))
    part = drawn[inside((200, 100))]
    height, width = part.shape[0] / 2, part.shape[1] / 4
    middle = [[part[round((r + 0.5) * height), round((c + 0.5) * width)] for c in range(4)] for r in range(2)]
    assert middle[0][1][2] > middle[0][1][1]  # dark violet
    assert middle[1][3][0] > 200 > middle[1][3][2] + 50  # yellow
    assert all(min(middle[r][c]) > 240 for r, c in ((0, 0), (0, 2), (0, 3), (1, 1), (1, 2)))


def test_the_query_is_marked(tmp_path) -> None:
    drawn = pixels(draw_sheet(sheet(Panel("a"), (4, 4), (100, 100), (1, 2)), tmp_path / "a.png"))
    part = drawn[inside((100, 100))]
    vermilion = np.array([int(QUERY[i : i + 2], 16) for i in (1, 3, 5)])
    y, x = np.nonzero(np.abs(part - vermilion).sum(-1) < 30)
    assert y.mean() / part.shape[0] == pytest.approx(1.5 / 4, abs=0.02)
    assert x.mean() / part.shape[1] == pytest.approx(2.5 / 4, abs=0.02)


def test_classes_have_a_key(tmp_path) -> None:
    values = np.array([[0.0, 1.0], [2.0, 2.0]])
    drawn = pixels(
        draw_sheet(sheet(Panel("a", "", values, classes=("x", "y", "z")), (2, 2), (80, 80)), tmp_path / "a.png")
    )
    rows, _ = inside((80, 80))
    below = drawn[rows.stop + 4 :]
    for colour in CLASSES[:3]:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(below - wanted).sum(-1) < 24).sum() > 60


def test_nothing_is_cut_off(tmp_path) -> None:
    """The longest texts, on the narrowest picture."""
    text = "a note of many words that goes on for longer than a panel is wide, several times over"
    for size in ((30, 400), (800, 60), (100, 100)):
        panels = [Panel("what the model sees", text), Panel("b", text, np.ones((2, 2)), "% of its weights")]
        whole = Sheet(
            "a_backbone_of_a_long_name_224: hybrid-scale attention (untrained)",
            "stages.1.blocks.0.attn, 28 x 28 patches, query 7,12; random weights",
            Image.new("RGB", size, "gray"),
            (2, 2),
            [((0, 0), panels)],
        )
        drawn = pixels(draw_sheet(whole, tmp_path / "a.png"))
        edge = round(0.1 * DPI)
        for border in (drawn[:edge], drawn[-edge:], drawn[:, :edge], drawn[:, -edge:]):
            assert border.min() == 255


@pytest.mark.parametrize(
    ("size", "grid", "patch"),
    [((224, 224), (14, 14), (16, 16)), ((250, 130), (33, 63), (4, 4)), ((98, 70), (5, 7), (14, 14))],
)
def test_patches_have_their_size(size, grid, patch) -> None:
    """Grids that round up stick out of the picture."""
    assert cell(sheet(Panel("a"), grid, size)) == patch
    assert all(math.ceil(side / step) == count for side, step, count in zip(size[::-1], patch, grid, strict=True))
