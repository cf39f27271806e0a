"""Token merging in vision transformers of timm and open_clip: exact where it must be, and gone without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vislm.errors import UsageError
from vislm.golden import verify_folder
from vislm.token_pruning.tome.schedule import merge_schedule, schedule_to_keep, sizes_behind
from vislm.token_pruning.tome.vit import Groups, _rope_at, merging

GOLDEN = Path(__file__).parents[1] / "golden" / "tome"
SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 3, "img_size": 64, "num_classes": 5}
TIMM = {
    "vit": ("vit_tiny_patch16_224", {}),
    "layer scale, q/k norm, registers": (
        "vit_tiny_patch16_224",
        {"init_values": 0.5, "qk_norm": True, "reg_tokens": 3, "scale_attn_norm": True},
    ),
    "mean over patches, no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "registers, no class token": (
        "vit_tiny_patch16_224",
        {"class_token": False, "reg_tokens": 4, "global_pool": "avgmax", "no_embed_class": True},
    ),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "attention pool": ("vit_base_patch16_siglip_224", {}),
    "eva": ("eva_giant_patch14_224", {"img_size": 56}),
}
ROTARY = {
    "eva02": ("eva02_base_patch14_224", {"img_size": 56}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "rope, mixed": ("vit_small_patch16_rope_mixed_224", {}),
}
OPEN_CLIP = {
    "open_clip": {},
    "open_clip, layer scale, mean": {"ls_init_value": 0.5, "pool_type": "avg"},
    "open_clip, norms": {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True},
}


def model_of(name: str, **options: Any) -> Any:
    """Return a small model whose every parameter counts."""
    if name in OPEN_CLIP:
        from open_clip.transformer import VisionTransformer

        sizes = {"image_size": 64, "patch_size": 16, "width": 24, "layers": 3, "heads": 3, "mlp_ratio": 2.0}
        model = VisionTransformer(**sizes, output_dim=5, **OPEN_CLIP[name])
    elif name == "post norm":
        model = timm.models.vision_transformer.VisionTransformer(
            **SMALL, patch_size=16, block_fn=timm.models.vision_transformer.ResPostBlock
        )
    else:
        architecture, own = {**TIMM, **ROTARY}[name]
        model = timm.create_model(architecture, **{**SMALL, **own, **options})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.5 + 0.2 * noise if parameter.ndim == 1 and "norm" in key else 0.3 * noise)
    return model.eval()


def twins(model: Any) -> Tensor:
    """Return images whose patches come in equal pairs of neighbours, and take the position embedding away."""
    side, patch = (64, 16) if not hasattr(model, "patch_embed") else (model.patch_embed.img_size[0],) * 2
    if hasattr(model, "patch_embed"):
        patch = model.patch_embed.patch_size[0]
    table = getattr(model, "pos_embed", getattr(model, "positional_embedding", None))
    with torch.no_grad():
        table.zero_()
    half = torch.randn(2, 3, side, side // patch // 2, patch, generator=torch.Generator().manual_seed(0))
    return half[:, :, :, :, None].expand(-1, -1, -1, -1, 2, -1).reshape(2, 3, side, side)


@pytest.mark.parametrize("name", [*TIMM, "post norm", *OPEN_CLIP])
def test_merging_equal_patches_changes_nothing(name: str) -> None:
    """A token of size two stands for two equal tokens exactly: in attention, in the residual, in every pooling."""
    model = model_of(name)
    images = twins(model)
    expected = model(images)
    with merging(model, [8, 0, 0]) as merges:
        torch.testing.assert_close(model(images), expected, atol=2e-5, rtol=2e-4)
    assert merges.tokens[0] - merges.tokens[1] == 8
    assert sorted(merges.sizes[0].tolist()) == [1.0] * (merges.tokens[0] - 16) + [2.0] * 8
    with merging(model, [8, 0, 0], prop_attn=False):
        if merges.tokens[0] > 16:  # otherwise all keys have size two
            assert (model(images) - expected).abs().max() > 1e-4
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize(
    "name", ["vit", "layer scale, q/k norm, registers", "distilled", *ROTARY, "open_clip", "open_clip, norms"]
)
def test_merging_in_the_last_block_leaves_the_class_token_alone(name: str) -> None:
    """The last block's attention runs by ours, rotary positions and all; what follows is token by token."""
    model = model_of(name, **({"global_pool": "token"} if name in ROTARY else {}))
    side = model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else 64
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    with merging(model, [0, 0, 5]) as merges:
        torch.testing.assert_close(model(images), expected, atol=2e-5, rtol=2e-4)
    assert merges.tokens[-1] == merges.tokens[0] - 5
    with merging(model, 3):
        merged = model(images)
    assert (merged - expected).abs().max() > 1e-4


def test_rotary_positions_follow_the_token_that_stays() -> None:
    home = torch.tensor([[0, 1, 4, 3], [0, 3, 5, 2]])  # one prefix token, five patches
    groups = Groups(torch.ones(2, 4), torch.zeros(2, 6, dtype=torch.long), home)
    by_token, by_head, by_sample = torch.randn(5, 8), torch.randn(3, 5, 8), torch.randn(2, 3, 5, 8)
    for sample in range(2):
        places = home[sample, 1:] - 1
        assert torch.equal(_rope_at(by_token, groups)[sample, 0], by_token[places])
        assert torch.equal(_rope_at(by_head, groups)[sample], by_head[:, places])
        assert torch.equal(_rope_at(by_sample, groups)[sample], by_sample[sample][:, places])
    with_prefix = torch.randn(6, 8)
    assert torch.equal(_rope_at(with_prefix, groups)[1, 0], with_prefix[home[1]])


def test_sizes_sources_and_unmerging() -> None:
    model = model_of("distilled")
    images = torch.randn(2, 3, 64, 64)
    with merging(model, (4, -1.0)) as merges:
        features = model.forward_features(images)
    assert merges.schedule == [8, 4, 0]
    assert merges.tokens == [18, 10, 6, 6]
    matrix = merges.source_matrix()
    assert matrix.shape == (2, 6, 18)
    assert torch.equal(matrix.sum(-1), merges.sizes)
    assert torch.equal(matrix[:, :2, :2], torch.eye(2).expand(2, 2, 2))  # class and distillation token
    assert torch.equal(merges.unmerge(features), matrix.transpose(1, 2) @ features)
    with merging(model, 0) as merges:
        assert torch.equal(model.forward_features(images), model.forward_features(images))
    assert torch.equal(merges.sizes, torch.ones(2, 18))


def test_nothing_to_merge_is_bit_identical_and_nothing_stays_behind() -> None:
    model = model_of("attention pool")
    images = torch.randn(2, 3, 64, 64)
    expected, names = model(images), set(model.state_dict())
    with merging(model, 0):
        assert torch.equal(model(images), expected)
        assert set(model.state_dict()) == names
    with pytest.raises(ZeroDivisionError), merging(model, 3):
        model(images)
        raise ZeroDivisionError
    handle = merging(model, 3)
    with pytest.raises(UsageError, match="merged already"):
        merging(model, 2)
    assert not torch.equal(model(images), expected)
    handle.undo()
    assert torch.equal(model(images), expected)
    assert "pool" not in model.__dict__
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.modules())


def test_a_whole_open_clip_model_and_its_timm_tower() -> None:
    import open_clip

    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 64, "patch_size": 16, "width": 24, "head_width": 8, "layers": 2}
    trunk = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "image_size": 224}
    for tower, tokens in ((vision, [17, 14, 11]), (trunk, [197 - 3 * n for n in range(13)])):
        model = open_clip.CLIP(embed_dim=8, vision_cfg=tower, text_cfg=text).eval()
        with torch.no_grad(), merging(model, 3) as merges:
            assert model.encode_image(torch.randn(1, 3, tower["image_size"], tower["image_size"])).shape == (1, 8)
        assert merges.tokens == tokens


@pytest.mark.parametrize("name", ["layer scale, q/k norm, registers", "open_clip"])
def test_gradients_reach_every_parameter_and_survive_checkpointing(name: str) -> None:
    model = model_of(name).train()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        with merging(model, 3) as merges:
            model(images).square().sum().backward()
            tokens = merges.tokens
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        assert tokens == [tokens[0] - 3 * block for block in range(4)]
    assert found[0].keys() >= {key for key, _ in model.named_parameters() if "block" in key}
    for key, gradient in found[0].items():
        assert gradient.abs().max() > 0 or "k_norm.bias" in key or "bias" in key
        torch.testing.assert_close(found[1][key], gradient)


def test_dropout_of_attention_weights_in_training() -> None:
    model = model_of("vit", attn_drop_rate=0.5)
    images = torch.randn(2, 3, 64, 64)
    with merging(model, 3):
        assert torch.equal(model(images), model(images))
        model.train()
        assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize("name", ["vit", "eva02", "open_clip"])
def test_half_precision(name: str) -> None:
    model = model_of(name)
    side = model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else 64
    images = torch.randn(2, 3, side, side)
    with merging(model, 3), torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(images)).all()
        out = model.bfloat16()(images.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


def test_no_tensor_is_as_large_as_the_attention_matrix() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return out

    model = model_of("vit", img_size=256, patch_size=8)
    with torch.no_grad(), merging(model, 20) as merges, Largest() as largest:
        model(torch.randn(1, 3, 256, 256))
    assert largest.numel < 3 * min(merges.tokens) ** 2 / 2


@pytest.mark.parametrize(
    ("model", "r", "message"),
    [
        (nn.Linear(2, 2), 3, "plain vision transformer"),
        ("parallel", 3, "block 0 is a timm.models.vision_transformer.ParallelScalingBlock"),
        ("vit", -1, "r=-1: expected tokens to merge per layer"),
        ("vit", 2.5, "r=2.5"),
        ("vit", True, "r=True"),
        ("vit", [1, 2, 3, 4], "r has 4 numbers, expected at most one for each of 3"),
    ],
    ids=str,
)
def test_refusals(model: Any, r: Any, message: str) -> None:
    if model == "parallel":
        block = timm.models.vision_transformer.ParallelScalingBlock
        model = timm.models.vision_transformer.VisionTransformer(**SMALL, patch_size=16, block_fn=block)
    with pytest.raises(UsageError, match=message):
        merging(model_of(model) if isinstance(model, str) else model, r)


def test_masks_and_single_blocks_are_refused_while_merging() -> None:
    model = model_of("vit")
    with merging(model, 3) as merges:
        with pytest.raises(UsageError, match="run the model first"):
            _ = merges.sizes
        with pytest.raises(UsageError, match="whole model"):
            model.blocks[1](torch.randn(1, 17, 24))
        with pytest.raises(UsageError, match="attn_mask"):
            model(torch.randn(1, 3, 64, 64), attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_schedules() -> None:
    assert merge_schedule(13, 3) == [13, 13, 13]
    assert merge_schedule((13, -1.0), 12) == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    assert merge_schedule((13, 1.0), 12) == [0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 26]
    assert merge_schedule([4, 1], 3) == [4, 1, 0]
    for keep in (1, 64, 128, 192, 575):
        schedule = schedule_to_keep(keep, 576, 23)
        assert sizes_behind(schedule, 576)[-1] == keep
        assert len({r for r in schedule[:-1] if r}) == 1 or keep == 1
    with pytest.raises(UsageError, match="keep=3: merging in 2 layers leaves at least 4 of 16"):
        schedule_to_keep(3, 16, 2)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda path: path.stem)
def test_golden_fixtures_pass_and_any_changed_output_is_noticed(path: Path, tmp_path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    names = [name for name in tensors if name.startswith("out.")]
    wrong = {**tensors, **{name: tensors[name].clone() for name in names}}
    for name in names:
        wrong[name].view(-1)[-1] += 0.01
    for folder, content in (("right", tensors), ("wrong", wrong)):
        (tmp_path / folder).mkdir()
        save_file(content, tmp_path / folder / "case.safetensors", metadata)
    (right,), (verdict,) = verify_folder(tmp_path / "right"), verify_folder(tmp_path / "wrong")
    assert right.status == "pass", right.reason
    assert not right.reason
    failed = {comparison.name for comparison in verdict.comparisons if not comparison.passed}
    assert failed == {name.removeprefix("out.") for name in names}
