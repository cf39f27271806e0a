"""The session against the untouched model: neutral plans, drop = mask, batches, caches, restoration."""

from __future__ import annotations

from dataclasses import dataclass

import models
import pytest
import torch
from models import IMAGE_TOKEN, PATCHES
from torch import Tensor

from vislm import VHR, FastV, FlowCut, RandomPruning, attach
from vislm.errors import PlanConflict, UsageError
from vislm.lmm.adapters import adapter_for
from vislm.lmm.cost import DecoderShape

GENERATE = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6}


def generate(model, inputs, *interventions, **options):
    with attach(model, *interventions) as session:
        out = model.generate(**inputs, **{**GENERATE, **options})
    return torch.stack(out.logits), out, session.last_run


def one_image(family: str, seed: int = 0, words: tuple[int, ...] = (7, 8, 9), dtype=torch.float32):
    """A prompt with one image; for LLaVA-NeXT one of 64 x 48 pixels: 2 x 2 tiles, unpadded, with newlines."""
    if family == "llava":
        return {"input_ids": models.prompt(*words), "pixel_values": models.pixels(1, seed, dtype)}
    tiles = torch.randn(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tokens = 16 + 8 * (6 + 1)  # base view; 8 rows of 6 patches and a newline
    return {
        "input_ids": models.prompt(*words, tokens=tokens),
        "pixel_values": tiles,
        "image_sizes": torch.tensor([[64, 48]]),
    }


FAMILIES = {"llava": models.llava, "llava_next": models.llava_next}
families = pytest.mark.parametrize("family", FAMILIES)


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


@dataclass(frozen=True)
class KeepGiven:
    """Keeps chosen tokens of every image before the language model."""

    keep: tuple[int, ...]
    positions: str = "original"
    name = "given"

    def plan(self, adapter):
        from vislm.lmm.interventions import PromptStage

        return [PromptStage(self.select, self.positions)]

    def select(self, view) -> Tensor:
        chosen = torch.zeros_like(view.candidates)
        chosen[list(self.keep)] = True
        return chosen


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


METHODS = {
    "nothing": (),
    "random": (RandomPruning(keep=5),),
    "flowcut": (FlowCut(keep=5, tower_keep=6),),
    "flowcut-both": (FlowCut(keep=5, where="both", tower_keep=8),),
    "fastv": (FastV(keep=5),),
    "fastv-contiguous": (FastV(keep=5, positions="contiguous"),),
    "vhr": (VHR(alpha=2.0),),
    "flowcut+vhr": (FlowCut(keep=5, tower_keep=6), VHR(alpha=2.0)),
    "flowcut+fastv+vhr": (FlowCut(keep=8, where="tower"), FastV(keep=4), VHR(alpha=2.0, text_stream="image_only")),
}


def mixed_batch():
    """Left padding; one image, two images, none."""
    prompts = [models.prompt(7, 8, 9), models.prompt(7, images=2), torch.tensor([[1, 5, 6, 9, 10, 11]])]
    images = [models.pixels(1, 0), models.pixels(2, 1), None]
    batch = {**models.left_pad(*prompts), "pixel_values": torch.cat([i for i in images if i is not None])}
    singles = [
        {"input_ids": p, **({} if i is None else {"pixel_values": i})} for p, i in zip(prompts, images, strict=True)
    ]
    return batch, singles


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


def hook_count(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def implementations(model) -> tuple[str, str]:
    return model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_restored_after_an_exception(method) -> None:
    model, inputs = models.llava(), one_image("llava")
    plain = torch.stack(model.generate(**inputs, **GENERATE).logits)
    hooks = hook_count(model)

    def fail(module, args):
        raise KeyboardInterrupt

    handle = model.model.language_model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), attach(model, *METHODS[method]):
        model.generate(**inputs, **GENERATE)
    handle.remove()
    assert hook_count(model) == hooks
    assert implementations(model) == ("sdpa", "sdpa")
    assert torch.equal(torch.stack(model.generate(**inputs, **GENERATE).logits), plain)


def test_a_failed_call_does_not_spoil_the_next_one_inside_the_context() -> None:
    model, inputs = models.llava(), one_image("llava")
    expected, _, _ = generate(model, inputs, *METHODS["flowcut+fastv+vhr"])
    with attach(model, *METHODS["flowcut+fastv+vhr"]):
        with pytest.raises(ValueError, match="image"):
            model.generate(input_ids=models.prompt(7, tokens=3), pixel_values=inputs["pixel_values"], **GENERATE)
        again = torch.stack(model.generate(**inputs, **GENERATE).logits)
    assert torch.equal(again, expected)


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


def test_conflicts_name_both_owners() -> None:
    model = models.llava()
    with (
        pytest.raises(PlanConflict, match="random and given both prune the prompt"),
        attach(model, RandomPruning(keep=4), KeepGiven((0,))),
    ):
        pass
    with pytest.raises(PlanConflict, match=r"fastv.* layer"), attach(model, FastV(layer=9)):
        pass
    with pytest.raises(PlanConflict, match="vhr was given twice"), attach(model, VHR(), VHR(alpha=3.0)):
        pass
    with (
        pytest.raises(PlanConflict, match=r"given wants original positions and flowcut contiguous"),
        attach(model, FlowCut(keep=4), KeepGiven((0,))),
    ):
        pass
    with pytest.raises(PlanConflict, match=r"layers \[7\]"), attach(model, VHR(layers=(7,))):
        pass
    assert hook_count(model) == hook_count(models.llava())


@pytest.mark.parametrize("keep", [0, -3, 1.5, 0.0, True, PATCHES + 1, "many"])
@pytest.mark.parametrize("method", [RandomPruning, FlowCut, FastV])
def test_impossible_budgets_are_refused(method, keep) -> None:
    with pytest.raises(UsageError, match="keep="), attach(models.llava(), method(keep=keep)):
        pass


def test_static_cache_is_refused_with_a_remedy() -> None:
    model, inputs = models.llava(), one_image("llava")
    for method in ("random", "fastv"):
        with pytest.raises(UsageError, match="dynamic cache"):
            generate(model, inputs, *METHODS[method], cache_implementation="static")
    generate(model, inputs, VHR(), cache_implementation="static")


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


@pytest.mark.parametrize("method", ["random", "flowcut"])
def test_continuing_a_pruned_cache_is_refused(method) -> None:
    model, inputs = models.llava(), one_image("llava")
    with attach(model, *METHODS[method]):
        out = model.generate(**inputs, **GENERATE)
        longer = torch.cat([out.sequences, torch.tensor([[7, 8]])], 1)
        with pytest.raises(UsageError, match="whole conversation"):
            model.generate(input_ids=longer, past_key_values=out.past_key_values, **GENERATE)


def test_right_padding_is_refused_where_the_last_column_matters() -> None:
    model = models.llava()
    inputs = one_image("llava")
    ids = torch.cat([inputs["input_ids"], torch.zeros(1, 2, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(inputs["input_ids"]), torch.zeros(1, 2, dtype=torch.long)], 1)
    with pytest.raises(UsageError, match="left"), torch.no_grad(), attach(model, VHR()):
        model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"])


def test_models_without_images_or_adapter_are_refused() -> None:
    from transformers import LlamaForCausalLM

    _, text = models.configs()
    with pytest.raises(UsageError, match="without images"):
        adapter_for(LlamaForCausalLM(text))
    with pytest.raises(UsageError, match="not an intervention"), attach(models.llava(), FlowCut):  # type: ignore[arg-type]
        pass
    eager = models.llava()
    eager.set_attn_implementation("eager")
    with pytest.raises(UsageError, match="attn_implementation='sdpa'"), attach(eager, VHR()):
        pass


def test_a_sampled_placeholder_is_not_an_image() -> None:
    """Placeholders count in the prompt alone, even if the model writes one."""
    model, inputs = models.llava(), one_image("llava")
    with torch.no_grad():
        model.lm_head.weight[IMAGE_TOKEN] = 50.0 * model.lm_head.weight.abs().max()
    logits, out, run = generate(model, inputs, *METHODS["flowcut+fastv+vhr"])
    assert torch.isfinite(logits).all()
    assert run.visual_tokens == [PATCHES]
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + 6
