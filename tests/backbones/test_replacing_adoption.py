"""Every attention in every kind of vision transformer: what stays, what is new, what stays equal in part."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vislm.attention import attention_names
from vislm.backbones.replacing import attention_of, replace_attention
from vislm.errors import UsageError

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore:.* agents on a map of:UserWarning")

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 64, "num_classes": 5}
MODELS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "eva02": ("eva02_base_patch14_224", {"img_size": 56}),
    "beit": ("beit_base_patch16_224", {"init_values": 0.5}),
    "clip": (None, {}),
}
OPTIONS = {
    "agent": {"agent_num": 4, "table_size": 4},
    "agent_cswin": {"agent_num": 4, "table_size": 4, "split_size": 2},
    "cswin": {"split_size": 2},
    "dense": {},
    "halo": {"block_size": 2, "halo_size": 1},
    "hybrid_scale": {"sr_ratio": 2, "window_size": 2},
    "large_kernel": {"kernel_size": 9},
    "lepe": {},
    "moh": {},
    "moh_aggregated": {"sr_ratio": 2, "pretrained_grid": 4},
    "moh_cosine": {},
    "moh_llama": {},
    "neighborhood": {"window_size": 3, "rel_pos_bias": True},
    "self_guided": {"sr_ratio": 2},
    "sigmoid": {},
    "super_token": {"stoken_size": 2},
    "window": {"window_size": 2, "shifted": True},
}


def asked(attention: str):
    return ["hybrid_scale", "self_guided"] if attention == "self_guided" else attention


def model_of(name: str) -> nn.Module:
    """Return a small model with drawn parameters, so that every one of them counts."""
    architecture, options = MODELS[name]
    torch.manual_seed(0)
    if architecture is None:
        from open_clip.transformer import VisionTransformer

        sizes = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "heads": 4, "mlp_ratio": 2.0}
        model = VisionTransformer(**sizes, output_dim=5)
    else:
        model = timm.create_model(architecture, pretrained=False, **{**SMALL, **options})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.5 + 0.2 * noise if parameter.ndim == 1 and "norm" in key else 0.3 * noise)
    return model.eval()


def images_for(name: str) -> torch.Tensor:
    side = MODELS[name][1].get("img_size", 64)
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_no_attention_is_left_out() -> None:
    assert set(OPTIONS) == set(attention_names())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", OPTIONS)
def test_every_attention_in_every_model(name, attention) -> None:
    model, images = model_of(name), images_for(name)
    expected, before = model(images), set(dict(model.named_parameters()))
    if (name, attention) == ("eva02", "self_guided"):
        with pytest.raises(UsageError, match="no rotary position together"):
            replace_attention(model, asked(attention), **OPTIONS[attention])
        assert torch.equal(model(images), expected)
        return
    handle = replace_attention(model, asked(attention), **OPTIONS[attention])
    parameters = dict(model.named_parameters())
    assert {*handle.kept, *handle.unused} == {key for key in before if ".attn." in key}
    assert set(handle.new) == set(parameters) - before
    ours = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(ours, alone, atol=1e-4, rtol=1e-4)
    assert bool(ours.isfinite().all())
    model.train()
    model(images).square().sum().backward()
    lacking = {key for key, parameter in parameters.items() if parameter.grad is None}
    assert lacking == set(handle.unused)
    handle.undo()
    torch.testing.assert_close(model.eval()(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", OPTIONS)
def test_half_precision_and_copies(attention) -> None:
    model, images = model_of("deit, distilled"), images_for("deit, distilled")
    replace_attention(model, asked(attention), **OPTIONS[attention])
    expected, twin = model(images), copy.deepcopy(model)
    ours = model.bfloat16()(images.bfloat16()).float()
    assert (ours - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(twin(images), expected)


class TestBeit:
    """Its table of relative positions goes on as that of windows and neighborhoods."""

    @pytest.mark.parametrize(
        ("attention", "options"),
        [
            ("window", {"window_size": 4}),
            ("window", {"window_size": 7}),
            ("neighborhood", {"window_size": 4}),
        ],
    )
    def test_a_window_over_the_whole_grid_changes_nothing(self, attention, options) -> None:
        model, images = model_of("beit"), images_for("beit")
        expected = model(images)
        handle = replace_attention(model, attention, **options)
        torch.testing.assert_close(model(images), expected, atol=2e-5, rtol=2e-4)
        assert handle.unused == handle.new == []
        with torch.no_grad():
            model.blocks[0].attn.relative_position_bias_table.mul_(-1)
        changed = model(images)
        assert (changed - expected).abs().max() > 1e-3
        handle.undo()
        torch.testing.assert_close(model(images), changed, atol=2e-5, rtol=2e-4)

    @pytest.mark.parametrize("dilation", [1, 2])
    def test_smaller_neighborhoods_have_its_entries(self, dilation) -> None:
        from vislm.kernels import Neighborhood

        model = model_of("beit")
        attention, x = model.blocks[0].attn, torch.randn(1, 17, 32)
        bias = attention._get_rel_pos_bias()
        positions = torch.arange(17)
        allowed = Neighborhood((4, 4), 2, dilation=dilation, prefix=1).mask(positions[:, None], positions[None])
        expected = attention(x, shared_rel_pos_bias=torch.zeros_like(bias).masked_fill(~allowed, -torch.inf))
        handle = replace_attention(model, "neighborhood", window_size=2, dilation=dilation)
        model(images_for("beit"))
        torch.testing.assert_close(model.blocks[0].attn(x), expected, atol=2e-5, rtol=2e-4)
        assert handle.new == []

    def test_other_attentions_leave_it_out_and_say_so(self) -> None:
        model = model_of("beit")
        handle = replace_attention(model, "lepe")
        assert handle.unused == [f"blocks.{layer}.attn.relative_position_bias_table" for layer in range(2)]
        assert "unused: relative_position_bias_table" in str(handle)
        handle.undo()
        handle = replace_attention(model, "neighborhood", window_size=3, rel_pos_bias=False)
        assert len(handle.unused) == 2

    def test_without_a_table_of_its_own(self) -> None:
        sizes = {**SMALL, "use_rel_pos_bias": False, "use_abs_pos_emb": True}
        model = timm.create_model("beit_base_patch16_224", **sizes).eval()
        images = torch.randn(1, 3, 64, 64)
        expected = model(images)
        with replace_attention(model, "window", window_size=4):
            torch.testing.assert_close(model(images), expected)

    def test_shared_tables_are_refused(self) -> None:
        tables = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
        model = timm.create_model("beit_base_patch16_224", **SMALL, **tables)
        with pytest.raises(UsageError, match="share one table"):
            replace_attention(model, "window", window_size=4)

    def test_dropout_of_weights_sees_the_table_too(self) -> None:
        model, images = model_of("beit"), images_for("beit")
        expected = model(images)
        for block in model.blocks:
            block.attn.attn_drop.p = 1e-9
        replace_attention(model, "window", window_size=4)
        torch.testing.assert_close(model.train()(images), expected, atol=2e-5, rtol=2e-4)


def heads_of(model: nn.Module, images: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """Return what goes into a layer's output projection, ``(B, N, C)``."""
    seen: list[torch.Tensor] = []
    hook = model.blocks[layer].attn.proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(images)
    hook.remove()
    return seen[0]


class TestWhatStaysEqual:
    @pytest.mark.parametrize("name", ["vit", "siglip", "eva02"])
    def test_local_heads_of_hybrid_scale(self, name) -> None:
        model, images = model_of(name), images_for(name)
        expected = heads_of(model, images)
        replace_attention(model, "hybrid_scale", window_size=4, sr_ratio=2)
        ours = heads_of(model, images)
        torch.testing.assert_close(ours[..., 16:], expected[..., 16:], atol=2e-5, rtol=2e-4)
        assert (ours[..., :16] - expected[..., :16]).abs().max() > 1e-3

    @pytest.mark.parametrize("name", ["vit", "deit, distilled", "eva02"])
    def test_class_tokens_read_on_beside_large_kernels(self, name) -> None:
        model, images = model_of(name), images_for(name)
        prefix, expected = model.num_prefix_tokens, heads_of(model, images)
        replace_attention(model, "large_kernel")
        ours = heads_of(model, images)
        torch.testing.assert_close(ours[:, :prefix], expected[:, :prefix], atol=2e-5, rtol=2e-4)

    def test_large_kernels_start_as_values_through_their_activation(self) -> None:
        model, images = model_of("siglip"), images_for("siglip")
        attention, seen = model.blocks[0].attn, []
        attention.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        model(images)
        value = attention.qkv(seen[0]).chunk(3, dim=-1)[2]
        replace_attention(model, "large_kernel")
        torch.testing.assert_close(heads_of(model, images), nn.functional.gelu(value), atol=2e-5, rtol=2e-4)

    def test_coarse_keys_have_the_mean_of_their_rotary_positions(self) -> None:
        """A grid of super tokens of which each is one token has the tokens' own positions."""
        from vislm.backbones.replacing_host import ReplacedAttention

        model, images = model_of("eva02"), images_for("eva02")
        replace_attention(model, "hybrid_scale", window_size=4, sr_ratio=1)
        host = model.blocks[0].attn
        assert isinstance(host, ReplacedAttention)
        model(images)
        host._rope = rope = torch.randn(16, 16)
        assert host._rope_of(17) is rope
        host.mixer.sr_ratio = 2
        pooled = rope.view(2, 2, 2, 2, 16).mean((1, 3)).flatten(0, 1)
        torch.testing.assert_close(host._rope_of(5), pooled)


class TestTurns:
    def test_swin_shifts_every_second_layer(self) -> None:
        model = model_of("vit")
        handle = replace_attention(model, ["window", {"name": "window", "shifted": True}], window_size=2)
        assert [block.attn.mixer.shifted for block in model.blocks] == [False, True]
        assert str(handle).startswith("window in layers 0 to 1\n  kept: qkv.weight, qkv.bias, proj.weight, proj.bias\n")
        assert "new: mixer.relative_position_bias_table" in str(handle)

    def test_significance_goes_from_layer_to_layer(self) -> None:
        model, images = model_of("vit"), images_for("vit")
        handle = replace_attention(model, ["hybrid_scale", "self_guided"], sr_ratio=2)
        assert [site.attention for site in attention_of(model)] == ["hybrid_scale", "self_guided"]
        expected = model(images)
        assert "self_guided: keys are means" in str(handle)
        first, second = (block.attn for block in model.blocks)
        assert first.tells is second.hears
        with torch.no_grad():
            first.mixer.sr.weight.normal_()
        assert not torch.allclose(model(images), expected)

    def test_gradient_checkpointing_keeps_the_map(self) -> None:
        model, images, gradients = model_of("vit"), images_for("vit"), []
        replace_attention(model, ["hybrid_scale", "self_guided"], sr_ratio=2)
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.train().zero_grad()
            model(images).square().mean().backward()
            gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
        torch.testing.assert_close(*gradients)


class OwnAttention(nn.Module):
    """Attention to the mean of the values alone."""

    def __init__(self, dim: int, num_heads: int, share: float = 1.0) -> None:
        super().__init__()
        self.share = share
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        value = self.qkv(x).chunk(3, dim=-1)[2]
        return self.proj(self.share * value.mean(1, keepdim=True).expand_as(value))


class TestClassesOfYourOwn:
    def test_replace(self) -> None:
        model, images = model_of("siglip"), images_for("siglip")
        handle = replace_attention(model, OwnAttention, share=0.5)
        assert handle.new == []
        assert [site.attention for site in attention_of(model)] == ["OwnAttention"] * 2
        heads = heads_of(model, images)
        torch.testing.assert_close(heads, heads[:, :1].expand_as(heads))

    def test_in_a_backbone(self) -> None:
        from vislm.backbones import ViTConfig, build

        mixer = {"name": OwnAttention, "share": 2.0}
        model = build(ViTConfig(dim=8, depth=1, num_heads=2, mixer=mixer, class_token=False, global_pool="avg"))
        assert model.blocks[0].attn.share == 2.0

    def test_without_a_place_for_class_tokens(self) -> None:
        with pytest.raises(UsageError, match="no num_prefix_tokens"):
            replace_attention(model_of("vit"), OwnAttention)


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        ("self_guided", {}, r'give \["hybrid_scale", "self_guided"\]'),
        (["self_guided", "hybrid_scale"], {}, "in the layer before"),
        ("halo", {"stride": 2}, "leave these options out"),
        ("halo", {"qk_ratio": 0.5}, "leave these options out"),
        ("super_token", {"refine": "conv"}, "refine='conv' has no joint projection"),
        ("moh_llama", {"num_kv_heads": 2}, "leave num_kv_heads out"),
        ([], {}, "expected one attention or more"),
        ({"windo": 3}, {}, "expected {'name'"),
        ({"name": "window", "windowsize": 3}, {}, "did you mean 'window_size'"),
    ],
)
def test_faults_are_named_and_change_nothing(attention, options, message) -> None:
    model = model_of("vit")
    with pytest.raises(UsageError, match=message):
        replace_attention(model, attention, **options)
    assert not any(site.replaced for site in attention_of(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention"), [("eva02", "hybrid_scale"), ("beit", "window"), ("vit", "large_kernel")]
)
def test_compiled_and_exported(name, attention) -> None:
    torch.compiler.reset()
    model, images = model_of(name), images_for(name)
    replace_attention(model, asked(attention), **OPTIONS[attention])
    expected = model(images)
    torch.testing.assert_close(torch.compile(model, backend="eager")(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), expected, atol=1e-4, rtol=1e-4)
