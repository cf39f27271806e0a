"""The session against the untouched model: neutral plans, drop = mask, batches, caches, precision."""

from __future__ import annotations

import models
import pytest
import torch
from models import IMAGE_TOKEN, PATCHES
from running import (
    FAMILIES,
    GENERATE,
    METHODS,
    KeepGiven,
    families,
    generate,
    implementations,
    mixed_batch,
    one_image,
)
from torch import Tensor

from vislm import VHR, FastV, FlowCut, RandomPruning, attach
from vislm.lmm.cost.flops import DecoderShape


@families
@pytest.mark.parametrize(
    "neutral",
    [
        (),
        (RandomPruning(keep=1.0),),
        (FastV(keep=1.0),),
        (FlowCut(keep=1.0, where="both", tower_keep=PATCHES),),
        (VHR(alpha=1.0),),
    ],
    ids=["nothing", "random", "fastv", "flowcut", "vhr"],
)
def test_keeping_everything_is_bit_identical(family, neutral) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    plain = model.generate(**inputs, **GENERATE)
    logits, out, run = generate(model, inputs, *neutral)
    assert torch.equal(torch.stack(plain.logits), logits)
    assert torch.equal(plain.sequences, out.sequences)
    for ours, theirs in zip(out.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    assert run.visual_tokens_kept == run.visual_tokens


def masked_reference(model, inputs, hidden: list[int], steps: int, from_layer: int = 0) -> Tensor:
    """Greedy logits of the untouched full-length model in which every later query is blind to the hidden columns."""
    ids = inputs["input_ids"]
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    logits = []
    for _ in range(steps):
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        blind = mask.clone()
        blind[..., hidden] = False
        blind |= torch.eye(ids.shape[1], dtype=torch.bool)
        handles = []
        for number, layer in enumerate(model.model.language_model.layers):
            chosen = blind if number >= from_layer else mask

            def replace(module, args, kwargs, chosen=chosen):
                return args, {**kwargs, "attention_mask": chosen}

            handles.append(layer.register_forward_pre_hook(replace, with_kwargs=True))
        with torch.no_grad():
            out = model(input_ids=ids, **rest, use_cache=False, attention_mask=torch.ones_like(ids))
        for handle in handles:
            handle.remove()
        logits.append(out.logits[:, -1])
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
    return torch.stack(logits)


@families
def test_dropping_before_the_language_model_equals_masking(family) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    keep = (0, 3, 4, 9, 15)
    total = int((inputs["input_ids"] == IMAGE_TOKEN).sum())
    logits, _, run = generate(model, inputs, KeepGiven(keep), max_new_tokens=5)
    hidden = [3 + i for i in range(total) if i not in keep]
    torch.testing.assert_close(logits, masked_reference(model, inputs, hidden, 5), atol=1e-4, rtol=0)
    assert run.layer_tokens == [inputs["input_ids"].shape[1] - len(hidden)] * 5
    assert run.stages[0].index == [list(keep)]


@families
@pytest.mark.parametrize("layer", [1, 2, 4])
def test_dropping_inside_the_language_model_equals_masking(family, layer) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    logits, out, run = generate(model, inputs, FastV(keep=5, layer=layer), max_new_tokens=5)
    kept = run.stages[-1].index[0]
    total = int((inputs["input_ids"] == IMAGE_TOKEN).sum())
    hidden = [3 + i for i in range(total) if i not in kept]
    torch.testing.assert_close(logits, masked_reference(model, inputs, hidden, 5, layer), atol=1e-4, rtol=0)
    full = inputs["input_ids"].shape[1]
    assert run.layer_tokens == [full] * layer + [full - len(hidden)] * (5 - layer)
    assert [c.keys.shape[-2] for c in out.past_key_values.layers] == [n + 4 for n in run.layer_tokens]


def test_contiguous_positions_differ_and_follow_the_short_prompt() -> None:
    """Contiguous dropping equals a model that was given the short prompt in the first place."""
    model, inputs = models.llava(), one_image("llava")
    keep = (1, 2, 7)
    logits, _, _ = generate(model, inputs, KeepGiven(keep, "contiguous"))
    features = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    features.pooler_output = [features.pooler_output[0][list(keep)]]
    short = {"input_ids": models.prompt(7, 8, 9, tokens=3), "mm_encoder_outputs": {"image": features}}
    with torch.no_grad():
        expected = torch.stack(model.generate(**short, **GENERATE).logits)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    original, _, _ = generate(model, inputs, KeepGiven(keep, "original"))
    assert (original - logits).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_singles(method) -> None:
    model = models.llava()
    batch, singles = mixed_batch()
    together, _, run = generate(model, batch, *METHODS[method])
    kept = []
    for row, inputs in enumerate(singles):
        alone, _, single_run = generate(model, inputs, *METHODS[method])
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=1e-4, rtol=0)
        kept += single_run.stages[-1].index if single_run.stages else [list(range(n)) for n in single_run.visual_tokens]
    assert (run.stages[-1].index if run.stages else [list(range(n)) for n in run.visual_tokens]) == kept


@families
@pytest.mark.parametrize("method", METHODS)
def test_beam_search_runs_and_equals_its_unbatched_self(family, method) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    logits, out, run = generate(model, inputs, *METHODS[method], num_beams=3)
    assert torch.isfinite(logits).all()
    greedy, _, _ = generate(model, inputs, *METHODS[method])
    torch.testing.assert_close(logits[0, :1], greedy[0], atol=1e-4, rtol=0)  # all beams start from the greedy prefill
    assert out.sequences.shape == (1, inputs["input_ids"].shape[1] + 6)
    assert run.batch == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@families
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_finite(family, method, dtype) -> None:
    model, inputs = FAMILIES[family](dtype=dtype), one_image(family, dtype=dtype)
    logits, _, run = generate(model, inputs, *METHODS[method])
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(f).all() for f in run.head_factors.values())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_key_value_bytes_equal_the_cost_model(method, kv_heads) -> None:
    model, inputs = models.llava(kv_heads=kv_heads), one_image("llava")
    _, out, run = generate(model, inputs, *METHODS[method])
    lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert lengths == [n + run.new_tokens for n in run.layer_tokens]
    assert run.kv_bytes == DecoderShape.of(model.config.text_config).kv_bytes(lengths, 4)


@families
@pytest.mark.parametrize("method", METHODS)
def test_scoring_without_cache_equals_cached_scoring(family, method) -> None:
    """Non-contiguous positions without a mask would be taken for packed documents by transformers."""
    model, inputs = FAMILIES[family](), one_image(family)
    with torch.no_grad(), attach(model, *METHODS[method]):
        cached = model(**inputs, use_cache=True).logits[:, -1]
        plain = model(**inputs, use_cache=False).logits[:, -1]
    torch.testing.assert_close(plain, cached, atol=1e-5, rtol=0)
    generated, _, _ = generate(model, inputs, *METHODS[method])
    torch.testing.assert_close(generated[0], cached, atol=1e-5, rtol=0)


def test_contexts_nest_and_two_models_do_not_mix() -> None:
    first, second, inputs = models.llava(0), models.llava(1), one_image("llava")
    alone, _, _ = generate(first, inputs, *METHODS["flowcut+vhr"])
    other, _, _ = generate(second, inputs, FastV(keep=3))
    with attach(first, *METHODS["flowcut"]), attach(second, FastV(keep=3)):
        with attach(first, *METHODS["vhr"]):
            nested = torch.stack(first.generate(**inputs, **GENERATE).logits)
        assert torch.equal(torch.stack(second.generate(**inputs, **GENERATE).logits), other)
        outer = torch.stack(first.generate(**inputs, **GENERATE).logits)
    assert torch.equal(nested, alone)
    assert torch.equal(outer, generate(first, inputs, *METHODS["flowcut"])[0])
    for model in (first, second):
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert implementations(model) == ("sdpa", "sdpa")


def test_left_padding_never_enters_the_result_of_the_registered_function() -> None:
    """Without a registered mask function transformers would pass no mask, and padding would be attended to."""
    model = models.llava()
    batch, _ = mixed_batch()
    plain = torch.stack(model.generate(**batch, **GENERATE).logits)
    logits, _, _ = generate(model, batch, VHR(alpha=1.5, layers=(4,), outlier_rule=True), FastV(keep=1.0))
    untouched, _, _ = generate(model, batch, FastV(keep=1.0))
    assert torch.equal(untouched, plain)
    assert not torch.equal(logits, plain)


def test_the_attention_matrix_is_never_built() -> None:
    """The largest tensor of a 1,030-token prefill stays far below heads x tokens x tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    model = models.llava()
    words = torch.randint(2, 60, (1, 1000)).tolist()[0]
    inputs = {**one_image("llava", words=tuple(words))}
    inputs["input_ids"] = inputs["input_ids"][:, :500]
    with torch.no_grad(), attach(model, *METHODS["flowcut+fastv+vhr"]), Largest() as largest:
        model(**inputs, logits_to_keep=1)
    assert largest.numel < 4 * 400 * 400


@pytest.mark.parametrize("padded", [False, True])
def test_static_cache_with_head_scaling_equals_dynamic(padded) -> None:
    model = models.llava()
    inputs = mixed_batch()[0] if padded else one_image("llava")
    dynamic, _, _ = generate(model, inputs, VHR())
    static, _, _ = generate(model, inputs, VHR(), cache_implementation="static")
    torch.testing.assert_close(static, dynamic, atol=1e-5, rtol=0)


def test_a_second_turn_on_a_kept_cache_keeps_the_heads_of_the_first() -> None:
    """Heads are fixed at the prefill; what was dropped inside the language model stays dropped."""
    model, inputs = models.llava(), one_image("llava")
    for methods in ((VHR(),), (FastV(keep=5),), (FastV(keep=5, positions="contiguous"), VHR())):
        with attach(model, *methods) as session:
            first = model.generate(**inputs, **GENERATE)
            factors = dict(session.last_run.head_factors)
            longer = torch.cat([first.sequences, torch.tensor([[7, 8]])], 1)
            second = model.generate(input_ids=longer, past_key_values=first.past_key_values, **GENERATE)
            assert torch.isfinite(torch.stack(second.logits)).all()
            assert session.last_run.head_factors.keys() == factors.keys()
            whole = model.generate(input_ids=longer, pixel_values=inputs["pixel_values"], **GENERATE)
        if methods == (FastV(keep=5),):  # the last prompt token, and so the ranking, differs; lengths do not
            lengths = [[c.keys.shape[-2] for c in out.past_key_values.layers] for out in (second, whole)]
            assert lengths[0] == lengths[1]


def test_a_sampled_placeholder_is_not_an_image() -> None:
    """Placeholders count in the prompt alone, even if the model writes one."""
    model, inputs = models.llava(), one_image("llava")
    with torch.no_grad():
        model.lm_head.weight[IMAGE_TOKEN] = 50.0 * model.lm_head.weight.abs().max()
    logits, out, run = generate(model, inputs, *METHODS["flowcut+fastv+vhr"])
    assert torch.isfinite(logits).all()
    assert run.visual_tokens == [PATCHES]
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + 6
