"""Importance of heads against switching them off by hand."""

from __future__ import annotations

import math

import models
import pytest
import timm
import torch

from vislm import load_lmm
from vislm.analysis.importance import PROXY, first_order, head_importance, predictor
from vislm.analysis.lmm_importance import dormant_effects, lmm_head_importance
from vislm.analysis.metrics import METRICS, Prediction, effects, js_divergence, rank_correlation, ranks
from vislm.analysis.vision import readable
from vislm.data.scenes import generate_scenes
from vislm.errors import UsageError


def tiny_vit(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}).eval()
    with torch.no_grad():
        for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            block.attn.qkv.weight.mul_(20)
            block.attn.proj.weight.mul_(20)
        model.head.weight.mul_(20)  # pyright: ignore
    return model


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_vit_metrics_equal_zeroed_columns_of_the_projection(rows) -> None:
    model, images, labels = tiny_vit(), pixels(), torch.tensor([0, 3, 1])
    with readable(model) as sites:
        found = head_importance(sites, predictor(model), images, labels, rows=rows)
    assert set(found) == {*METRICS, PROXY}
    with torch.no_grad():
        base = model(images).log_softmax(-1)
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        for layer, head in ((0, 1), (2, 0)):
            weight = model.blocks[layer].attn.proj.weight  # pyright: ignore
            kept = weight.clone()
            weight[:, head * 8 : head * 8 + 8] = 0.0
            without = model(images).log_softmax(-1)
            changed = model.forward_head(model.forward_features(images), pre_logits=True)
            weight.copy_(kept)
            own = labels[:, None]
            drop = (base.exp().gather(1, own) - without.exp().gather(1, own)).mean()
            loss = (base.gather(1, own) - without.gather(1, own)).mean()
            right = [(x.argmax(-1) == labels).float().mean() for x in (base, without)]
            cosine = 1 - torch.nn.functional.cosine_similarity(features, changed).mean()
            expected = dict(zip(METRICS, (drop, None, right[0] - right[1], cosine, loss), strict=True))
            for name, value in expected.items():
                if value is not None:
                    assert found[name][layer, head].item() == pytest.approx(value.item(), abs=1e-5)


def test_the_proxy_is_the_slope_at_a_gate() -> None:
    model, images, labels = tiny_vit(), pixels(1), torch.tensor([2])
    with readable(model) as sites:
        proxy = first_order(sites, predictor(model), images, labels)
    weight, step = model.blocks[1].attn.proj.weight, 1e-3  # pyright: ignore
    losses = []
    for factor in (1 + step, 1 - step):
        with torch.no_grad():
            kept = weight.clone()
            weight[:, 8:16] *= factor
            losses.append(torch.nn.functional.cross_entropy(model(images).double(), labels).item())
            weight.copy_(kept)
    assert proxy[1, 1].item() == pytest.approx(abs(losses[0] - losses[1]) / (2 * step), rel=0.02)


def test_without_classifier_only_features_are_compared() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    with readable(model.eval()) as sites:
        assert set(head_importance(sites, predictor(model), pixels(1))) == {"feature_change"}


def test_labels_have_to_fit() -> None:
    model = tiny_vit()
    with readable(model) as sites, pytest.raises(UsageError, match="one per image"):
        head_importance(sites, predictor(model), pixels(), torch.tensor([0]))


@pytest.fixture(scope="module")
def lmm():
    return load_lmm()


def test_lmm_metrics_equal_zeroed_columns_of_the_projection(lmm) -> None:
    scene, question = next(generate_scenes(1, 5)).image, "is there a car in the image ?"
    found = lmm_head_importance(lmm, scene, question, rows=5)
    inputs = lmm.prepare([scene], [question])
    with torch.no_grad():
        base = lmm.model(**inputs).logits[0, -1].log_softmax(-1)
        own = int(base.argmax())
        for layer, head in ((0, 0), (2, 2), (3, 1)):
            weight = lmm.adapter.layers[layer].self_attn.o_proj.weight
            kept = weight.clone()
            weight[:, head * 32 : head * 32 + 32] = 0.0
            without = lmm.model(**inputs).logits[0, -1].log_softmax(-1)
            weight.copy_(kept)
            expected = base[own].exp() - without[own].exp()
            assert found["probability_drop"][layer, head].item() == pytest.approx(expected.item(), abs=1e-4)
            rise = (base[own] - without[own]).item()
            assert found["loss_increase"][layer, head].item() == pytest.approx(rise, abs=1e-4)
    zero = dormant_effects(lmm, scene, question, "zero")
    torch.testing.assert_close(zero, found["loss_increase"], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(dormant_effects(lmm, scene, question, "first"), zero, atol=1e-3)


def test_chance_of_another_token(lmm) -> None:
    scene, question = next(generate_scenes(1, 5)).image, "is there a car in the image ?"
    (no,) = lmm.processor.tokenizer.encode("no", add_special_tokens=False)
    contrast = lmm_head_importance(lmm, scene, question, token=no)
    usual = lmm_head_importance(lmm, scene, question)
    assert (contrast["probability_drop"] * usual["probability_drop"]).sum() < 0  # what speaks for yes speaks against no


def test_divergence_bounds_and_ranks() -> None:
    one, other = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])  # a method rules words out
    assert js_divergence(one.clamp(min=-1e9), other).item() == pytest.approx(math.log(2))
    assert js_divergence(one, other).item() == pytest.approx(math.log(2))
    assert js_divergence(one, one).item() == 0.0
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 0.0])).tolist() == [3.5, 2.0, 3.5, 1.0]
    x = torch.arange(6.0).view(2, 3)
    maps = {"a": x, "b": x.exp(), "c": -x, "d": torch.zeros(2, 3)}
    table = rank_correlation(maps)
    torch.testing.assert_close(table[0, :3], torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    assert table[3].isnan().all()
    assert set(effects(Prediction(None, x), Prediction(None, x), None)) == {"feature_change"}


def test_tiny_llava_takes_a_head_off_at_every_position() -> None:
    from vislm.analysis.lmm_importance import HeadFactors, next_token

    model, inputs = models.llava(), {"input_ids": models.prompt(7, 8), "pixel_values": models.pixels()}
    zero = {layer: torch.zeros(1, 4) for layer in range(5)}
    with torch.no_grad():
        without = next_token(model, inputs, HeadFactors(zero)).logits
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()  # pyright: ignore
        expected = model(**inputs).logits[:, -1]
    torch.testing.assert_close(without, expected, atol=1e-5, rtol=1e-5)
