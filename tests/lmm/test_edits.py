"""Edited attention rows against an explicit eager implementation with whole matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import FAMILIES, families, generate, one_image

from vislm import FastV, FlowCut, attach
from vislm.errors import PlanConflict
from vislm.lmm.decoder import edits
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import EditStage, EditView, ProbeStage


@dataclass(frozen=True)
class Given:
    """A method made of given stages."""

    stages: tuple
    name: str = "given"

    def plan(self, adapter) -> tuple:
        return self.stages


LAYERS = frozenset(range(5))


@families
@pytest.mark.parametrize("rows", ["last", "after_image", "all"])
@pytest.mark.parametrize("piece", [edits.PIECE, 1])
def test_the_weights_of_the_softmax_change_nothing(family: str, rows: Any, piece: int, monkeypatch) -> None:
    monkeypatch.setattr(edits, "PIECE", piece)
    model, inputs = FAMILIES[family](), one_image(family)
    plain, _, _ = generate(model, inputs)
    same, _, _ = generate(model, inputs, Given((EditStage(LAYERS, lambda view: view.softmax(), rows),)))
    torch.testing.assert_close(plain, same, atol=3e-5, rtol=1e-5)


def test_leaving_the_rows_alone_is_bit_identical() -> None:
    model, inputs = models.llava(), one_image("llava")
    plain, _, _ = generate(model, inputs)
    same, _, _ = generate(model, inputs, Given((EditStage(LAYERS, lambda view: None, "all"),)))
    assert torch.equal(plain, same)


def eager_logits(model, inputs: dict, ids: torch.Tensor, edit) -> torch.Tensor:
    """Next-token logits of a whole sequence by eager attention whose weights ``edit(weights, layer)`` replaces."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.eager_attention_forward

    def forward(module, query, key, value, mask, scaling, **kwargs):
        key = modeling_llama.repeat_kv(key, module.num_key_value_groups)
        value = modeling_llama.repeat_kv(value, module.num_key_value_groups)
        logits = query @ key.transpose(2, 3) * scaling
        weights = edit((logits + mask).softmax(-1), logits, module.layer_idx)
        return (weights @ value).transpose(1, 2).contiguous(), None

    model.set_attn_implementation({"text_config": "eager"})
    modeling_llama.eager_attention_forward = forward
    try:
        with torch.no_grad():
            mask = torch.ones_like(ids)
            return model(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits[:, -1]
    finally:
        modeling_llama.eager_attention_forward = original
        model.set_attn_implementation({"text_config": "sdpa"})


def test_rows_behind_the_image_and_every_later_step_equal_the_eager_matrices() -> None:
    model, inputs = models.llava(), one_image("llava")
    image = inputs["input_ids"][0] == models.IMAGE_TOKEN
    end = int(image.nonzero()[-1]) + 1

    def halve(view: EditView) -> torch.Tensor:
        weights = view.softmax()
        return torch.where(view.keys.image[:, None, None], weights * 0.5, weights)

    def eager(weights: torch.Tensor, logits: torch.Tensor, layer: int) -> torch.Tensor:
        weights = weights.clone()
        weights[:, :, end:, : len(image)] *= torch.where(image, 0.5, 1.0)
        return weights

    logits, out, _ = generate(model, inputs, Given((EditStage(LAYERS, halve, "after_image"),)), max_new_tokens=8)
    for step in range(8):
        ids = out.sequences[:, : inputs["input_ids"].shape[1] + step]
        expected = eager_logits(model, inputs, ids, eager)
        torch.testing.assert_close(logits[step], expected, atol=1e-4, rtol=1e-4)


def test_listed_heads_only() -> None:
    model, inputs = models.llava(), one_image("llava")

    def zero(view: EditView) -> torch.Tensor:
        assert view.logits.shape[1] == 1
        return torch.zeros_like(view.logits)

    def eager(weights: torch.Tensor, logits: torch.Tensor, layer: int) -> torch.Tensor:
        weights = weights.clone()
        if layer in (2, 3):
            weights[:, 1 if layer == 2 else 3] = 0.0
        return weights

    stage = EditStage(frozenset({1, 2, 3}), zero, "all", heads=lambda layer: {2: [1], 3: [3]}.get(layer, []))
    logits, out, _ = generate(model, inputs, Given((stage,)), max_new_tokens=3)
    for step in range(3):
        ids = out.sequences[:, : inputs["input_ids"].shape[1] + step]
        torch.testing.assert_close(logits[step], eager_logits(model, inputs, ids, eager), atol=1e-4, rtol=1e-4)


def _image_only(view: EditView) -> torch.Tensor:
    return view.softmax(view.logits + torch.where(view.keys.image[:, None, None], 1.0, 0.0))


@pytest.mark.parametrize("pruner", [None, FlowCut(keep=6), FastV(keep=5)])
def test_a_batch_gives_what_its_samples_give_alone(pruner) -> None:
    model = models.llava()
    prompts = [models.prompt(7, 8), models.prompt(9), torch.tensor([[1, 5, 6, 7, 8, 9, 10]])]
    methods = [m for m in (pruner, Given((EditStage(LAYERS, _image_only, "after_image"),))) if m]
    pixels = models.pixels(2)
    together, _, _ = generate(model, {**models.left_pad(*prompts), "pixel_values": pixels}, *methods)
    for i, ids in enumerate(prompts):
        alone = {"input_ids": ids, **({"pixel_values": pixels[i : i + 1]} if i < 2 else {})}
        logits, _, _ = generate(model, alone, *methods)
        torch.testing.assert_close(together[:, i], logits[:, 0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_beams_and_static_caches(options: dict) -> None:
    model, inputs = models.llava(), one_image("llava")
    method = Given((EditStage(LAYERS, _image_only, "after_image"),))
    if "num_beams" in options:
        out = generate(model, inputs, method, **options)[1]
        assert out.sequences.shape[0] == 1
        return
    static, _, _ = generate(model, inputs, method, **options)
    dynamic, _, _ = generate(model, inputs, method)
    torch.testing.assert_close(static, dynamic, atol=1e-4, rtol=1e-4)


@given(
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    queries=st.integers(1, 6),
    past=st.integers(0, 5),
    kind=st.sampled_from(["none", "causal", "bool", "additive"]),
    seed=st.integers(0, 99),
)
def test_explicit_rows_equal_the_kernels_rows(heads, queries: int, past: int, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, g = heads
    keys = queries + past
    query = torch.randn(2, h, queries, 8, generator=generator)
    key, value = (torch.randn(2, g, keys, 8, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, queries, keys, generator=generator) > 0.3
    mask[..., 0] = True
    if kind == "causal" and past:
        return
    call = AttentionCall(
        query,
        key,
        value,
        {"bool": mask, "additive": torch.where(mask, 0.0, torch.finfo(torch.float32).min)}.get(kind),
        kind == "causal",
        0.3,
    )
    rows = torch.arange(queries)
    for chosen in (None, [h - 1, 0]):
        weights = call.logits(rows, chosen).masked_fill(~call.allowed(rows), -torch.inf).softmax(-1)
        index = list(range(h)) if chosen is None else chosen
        torch.testing.assert_close(weights, call.rows(rows)[:, index], atol=1e-5, rtol=1e-4)
        repeated = value.repeat_interleave(h // g, 1)[:, index]
        torch.testing.assert_close(call.mix(weights, chosen), (weights @ repeated).transpose(1, 2))


def test_contradictions_are_refused_by_name() -> None:
    one = Given((EditStage(frozenset({1, 2}), lambda view: None),), "one")
    two = Given((EditStage(frozenset({2}), lambda view: None),), "two")
    with pytest.raises(PlanConflict, match=r"one and two both edit the attention of decoder layers \[2\]"):
        with attach(models.llava(), one, two):
            pass
    apart = Given((EditStage(frozenset({2}), lambda view: None, heads=lambda layer: [0]),), "apart")
    other = Given((EditStage(frozenset({2}), lambda view: None, heads=lambda layer: [1]),), "other")
    with attach(models.llava(), apart, other):
        pass
    probe = Given((ProbeStage(lambda view: None, all_tokens=True),), "probe")
    with pytest.raises(PlanConflict, match="probe speaks of single image tokens, which fastv may have pruned away"):
        with attach(models.llava(), probe, FastV(keep=4)):
            pass


def test_a_probe_sees_images_and_changes_nothing() -> None:
    model, inputs = models.llava(), one_image("llava")
    seen: list[int] = []
    plain, _, _ = generate(model, inputs)
    probed, _, run = generate(model, inputs, Given((ProbeStage(lambda view: seen.append(len(view.features))),)))
    assert torch.equal(plain, probed)
    assert seen == [models.PATCHES]
    assert run.visual_tokens_kept == [models.PATCHES]
