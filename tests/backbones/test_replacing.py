"""Another attention inside transformers of timm and open_clip: the weights stay, and with a full window the output."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import vislm
from vislm.backbones.replacing import attention_of, replace_attention
from vislm.errors import UnknownName, UsageError

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 3, "img_size": 64, "num_classes": 5}
TIMM = {
    "vit": ("vit_tiny_patch16_224", {}),
    "qk norm, registers": ("vit_tiny_patch16_224", {"qk_norm": True, "reg_tokens": 2, "scale_attn_norm": True}),
    "deit3": ("deit3_small_patch16_224", {}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 70}),
    "eva": ("eva_giant_patch14_224", {"img_size": 70}),
    "eva02, separate projections": ("eva02_base_patch14_224", {"img_size": 70}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "rope, mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "gated": ("vit_small_patch16_dinov3", {}),
    "grouped queries": ("vit_small_patch16_dinov3", {}),
}
RARE = {
    "gated": {"gated": True, "qk_norm": True},
    "grouped queries": {"qkv_fused": False, "num_kv_heads": 1},
}


def spread(model: nn.Module) -> nn.Module:
    """Draw all parameters anew, so that every one of them counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.5 + 0.2 * noise if parameter.ndim == 1 and "norm" in name else 0.3 * noise)
    return model.eval()


def timm_model(name: str) -> nn.Module:
    architecture, options = TIMM[name]
    model = timm.create_model(architecture, **{**SMALL, **options})
    if name in RARE:
        for block in model.blocks:
            block.attn = timm.layers.AttentionRope(
                24, 3, num_prefix_tokens=5, norm_layer=nn.LayerNorm, rotate_half=True, **RARE[name]
            )
    return spread(model)


def clip_tower(**options) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    sizes = {"image_size": 64, "patch_size": 16, "width": 24, "layers": 3, "heads": 3, "mlp_ratio": 2.0}
    return spread(VisionTransformer(**sizes, output_dim=5, **options))


def images_for(model: nn.Module) -> tuple[torch.Tensor, int]:
    """Return images and the tokens along each side."""
    torch.manual_seed(0)
    side = model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else 64
    grid = model.patch_embed.grid_size[0] if hasattr(model, "patch_embed") else 4
    return torch.randn(2, 3, side, side), grid


def divisor(side: int) -> int:
    """Return the size of the smallest blocks that cover a side without rest."""
    return next(size for size in range(2, side + 1) if side % size == 0)


def assert_replaced_is_equal(model: nn.Module) -> None:
    images, side = images_for(model)
    names, expected = set(model.state_dict()), model(images)
    for attention, options in (
        ("neighborhood", {"window_size": side, "rel_pos_bias": True}),
        ("window", {"window_size": side}),
        ("super_token", {"stoken_size": 1}),
        ("moh", {"shared_heads": 1, "routed_heads": 2}),
        ("cswin", {"split_size": None}),
        ("dense", {}),
        ("halo", {"block_size": side, "halo_size": 0}),
        ("halo", {"block_size": divisor(side), "halo_size": side}),
        ("lepe", {}),
        ("moh_llama", {"shared_heads": 1, "routed_heads": 2}),
    ):
        with replace_attention(model, attention, **options):
            torch.testing.assert_close(model(images), expected, atol=2e-5, rtol=2e-4)
            assert names <= set(model.state_dict())
            assert all(".attn.mixer." in name for name in set(model.state_dict()) - names)
        assert set(model.state_dict()) == names
    with replace_attention(model, "neighborhood", window_size=3):
        assert (model(images) - expected).abs().max() > 1e-3
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", TIMM)
def test_a_window_over_the_whole_grid_changes_nothing_in_timm(name) -> None:
    assert_replaced_is_equal(timm_model(name))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True},
        {"ls_init_value": 0.5},
    ],
    ids=str,
)
def test_a_window_over_the_whole_grid_changes_nothing_in_open_clip(options) -> None:
    assert_replaced_is_equal(clip_tower(**options))


def test_scaled_cosine_attention(monkeypatch) -> None:
    model = clip_tower(scaled_cosine_attn=True, scale_heads=True)
    # open_clip 3 multiplies heads (B, H, N, D) by a function that takes three axes, so that its own forward fails.
    monkeypatch.setattr(torch, "bmm", torch.matmul)
    with torch.no_grad():
        model.transformer.resblocks[0].attn.logit_scale.fill_(9.0)  # more than its largest
    assert_replaced_is_equal(model)


def test_open_clip_models_and_their_timm_towers() -> None:
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 64, "patch_size": 16, "width": 24, "head_width": 8, "layers": 2}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model.encode_image(images)
    with replace_attention(model, "neighborhood", (1, 1), window_size=4):
        torch.testing.assert_close(model.encode_image(images), expected)
        assert [site.attention for site in attention_of(model)] == ["softmax", "neighborhood", "softmax"]
        assert model.encode_text(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8)
    names = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "image_size": 224}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=names, text_cfg=text).eval()
    handle = replace_attention(model, "window", (0, 2), window_size=7)
    assert handle.layers == range(3)
    assert model.encode_image(torch.randn(1, 3, 224, 224)).shape == (1, 8)


@pytest.mark.parametrize("name", ["vit", "dinov3", "eva"])
def test_a_smaller_window_is_the_masked_attention(name) -> None:
    """Check one layer against the model's own attention with the mask of the neighborhood."""
    from vislm.kernels import Neighborhood

    model = timm_model(name)
    images, side = images_for(model)
    prefix = model.num_prefix_tokens
    positions = torch.arange(prefix + side**2)
    mask = Neighborhood((side, side), 3, prefix=prefix).mask(positions[:, None], positions[None])
    with replace_attention(model, "neighborhood", window_size=3):
        ours = model(images)
    torch.testing.assert_close(ours, model(images, attn_mask=mask), atol=2e-5, rtol=2e-4)


def test_any_resolution() -> None:
    model = spread(timm.create_model("vit_tiny_patch16_224", **SMALL, dynamic_img_size=True))
    wide = torch.randn(1, 3, 48, 96)
    expected = model(wide)
    with replace_attention(model, "neighborhood", window_size=6, small_input="shrink"):
        torch.testing.assert_close(model(wide), expected, atol=2e-5, rtol=2e-4)
        assert model(torch.randn(1, 3, 96, 96)).shape == (1, 5)
    with replace_attention(model, "neighborhood", window_size=6):
        with pytest.raises(UsageError, match="larger than axis 0"):
            model(wide)


class TestTheModelGoesOn:
    def test_fine_tuned_projections_remain_after_undoing(self) -> None:
        model = timm_model("eva")
        images, side = images_for(model)
        handle = replace_attention(model, "window", window_size=side)
        with torch.no_grad():
            model.blocks[1].attn.qkv.weight.mul_(0.5)
            model.blocks[1].attn.q_bias.add_(1.0)
        trained = model(images)
        handle.undo()
        handle.undo()
        torch.testing.assert_close(model(images), trained, atol=2e-5, rtol=2e-4)

    def test_buffers_that_move_with_the_model(self) -> None:
        model = timm_model("eva")
        images, _ = images_for(model)
        with replace_attention(model, "neighborhood", window_size=3):
            model.double()
        assert model(images.double()).dtype == torch.float64

    def test_checkpoints_of_the_original_load(self) -> None:
        model, other = timm_model("vit"), spread(timm.create_model("vit_tiny_patch16_224", **SMALL)).double().float()
        with torch.no_grad():
            other.blocks[0].attn.qkv.weight.mul_(2)
        replace_attention(model, "neighborhood", window_size=4)
        images, _ = images_for(model)
        missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
        assert missing == unexpected == []
        torch.testing.assert_close(model(images), other(images), atol=2e-5, rtol=2e-4)

    def test_copies_are_independent(self) -> None:
        model = timm_model("dinov3")
        images, _ = images_for(model)
        replace_attention(model, "neighborhood", window_size=3)
        expected, twin = model(images), copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(twin(images), expected)

    def test_gradient_checkpointing(self) -> None:
        model = timm_model("dinov3")
        images, _ = images_for(model)
        replace_attention(model, "neighborhood", window_size=3)
        gradients = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.train().zero_grad()
            model(images).square().mean().backward()
            gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
        torch.testing.assert_close(*gradients)

    def test_compiled(self) -> None:
        model = timm_model("dinov3")
        images, _ = images_for(model)
        replace_attention(model, "neighborhood", window_size=3)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(images), model(images))

    def test_features(self) -> None:
        model = timm_model("vit")
        images, _ = images_for(model)
        with replace_attention(model, "window", (1, -1), window_size=2):
            features = model.forward_intermediates(images, intermediates_only=True)
        assert [tuple(feature.shape) for feature in features] == [(2, 24, 4, 4)] * 3


def test_what_is_used_where() -> None:
    model = timm_model("vit")
    replace_attention(model, "window", (-2, -1), window_size=2)
    sites = attention_of(model)
    assert [site.path for site in sites] == [f"blocks.{index}.attn" for index in range(3)]
    assert [site.attention for site in sites] == ["softmax", "window", "window"]
    assert [site.replaced for site in sites] == [False, True, True]
    assert "window_size=(2, 2)" in sites[1].options
    assert sites[0].options == "num_heads=3"
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=12, num_heads=(1, 2))
    assert [site.attention for site in attention_of(swin)] == ["WindowAttention"] * 2
    with torch.device("meta"):
        ours = vislm.create_model("nat_mini")
    assert [site.attention for site in attention_of(ours)] == ["neighborhood"] * 18


@pytest.mark.parametrize(
    ("attention", "layers", "options", "message"),
    [
        ("neighbourhood", (0, -1), {}, "did you mean 'neighborhood'"),
        ("window", (0, 3), {}, "first and last of 3 layers"),
        ("window", (2, 1), {}, "first and last of 3 layers"),
        ("window", (-4, 1), {}, "first and last of 3 layers"),
        ("window", (0, 1), {"windowsize": 3}, "did you mean 'window_size'"),
        ("window", (0, 1), {"dim": 3}, "unknown option of window 'dim'"),
        ("agent", (0, 1), {"separate_kv": True}, "no joint projection"),
    ],
)
def test_faults_are_named_and_change_nothing(attention, layers, options, message) -> None:
    model = timm_model("vit")
    with pytest.raises(UsageError, match=message):
        replace_attention(model, attention, layers, **options)
    assert not any(site.replaced for site in attention_of(model))


def test_models_and_calls_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="SwinTransformer has no blocks"):
        replace_attention(timm.create_model("swin_tiny_patch4_window7_224", depths=(1,), num_heads=(1,)), "window")
    relative = timm.create_model("vit_relpos_small_patch16_224", embed_dim=12, depth=1, num_heads=1)
    with pytest.raises(UsageError, match=r"layer 0 is a timm\.models\.vision_transformer_relpos"):
        replace_attention(relative, "window")
    model = timm_model("dinov3")
    images, side = images_for(model)
    handle = replace_attention(model, "window", window_size=side - 1)
    with pytest.raises(UsageError, match="rotary positions"):
        model(images)
    with pytest.raises(UsageError, match="takes no mask"):
        model(images, is_causal=True)
    with pytest.raises(UsageError, match=r"layer 0 is a .*ReplacedAttention"):
        replace_attention(model, "window")
    handle.undo()
    fresh = timm_model("vit")
    replace_attention(fresh, "dense")
    with pytest.raises(UsageError, match="call the whole model"):
        fresh.blocks[0](torch.randn(1, 17, 24))


def test_an_error_inside_undoes_too() -> None:
    model = timm_model("vit")
    with pytest.raises(ZeroDivisionError):
        with replace_attention(model, "dense"):
            math.fmod(1 // 0, 1)
    assert not any(site.replaced for site in attention_of(model))
    assert not model.patch_embed.proj._forward_hooks


def test_unknown_names_are_usage_errors() -> None:
    with pytest.raises(UnknownName):
        vislm.replace_attention(timm_model("vit"), "attention")
