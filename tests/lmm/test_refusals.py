"""What a session refuses, and that nothing is left behind when a call fails."""

from __future__ import annotations

import models
import pytest
import torch
from models import PATCHES
from running import (
    GENERATE,
    METHODS,
    KeepGiven,
    generate,
    hook_count,
    implementations,
    one_image,
)

from vislm import VHR, FastV, FlowCut, RandomPruning, attach
from vislm.errors import PlanConflict, UsageError
from vislm.lmm.adapters import adapter_for


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


@pytest.mark.parametrize("keep", [0, -3, 1.5, 0.0, True, "many"])
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


@pytest.mark.parametrize("method", [RandomPruning, FlowCut, FastV])
def test_a_budget_above_the_image_keeps_it_all(method) -> None:
    from running import generate, one_image

    model, inputs = models.llava(), one_image("llava")
    plain, _, _ = generate(model, inputs)
    kept, _, run = generate(model, inputs, method(keep=PATCHES + 1))
    assert run.visual_tokens_kept == [PATCHES]
    assert torch.equal(plain, kept)
