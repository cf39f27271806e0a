"""Stages of the session on tiny models: new contents in kept seats, own projections, logit biases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from running import families, generate, one_image
from torch import Tensor

from vislm import attach
from vislm.errors import PlanConflict, UsageError
from vislm.lmm.decoder.attention import add_to_mask
from vislm.lmm.interventions import (
    BiasStage,
    BiasView,
    LanguageSelection,
    LanguageStage,
    PromptStage,
    Selection,
)


@dataclass(frozen=True)
class Given:
    """A method made of given stages."""

    stages: tuple
    name: str = "given"

    def plan(self, adapter) -> tuple:
        return self.stages


def _model(family: str, **options: Any):
    from running import FAMILIES

    return FAMILIES[family](**options)


def test_new_tokens_in_kept_seats_equal_a_prompt_that_was_built_by_hand() -> None:
    model, inputs = _model("llava"), one_image("llava")
    seats = torch.tensor([1, 4, 9])

    def select(view) -> Selection:
        keep = torch.zeros_like(view.candidates)
        keep[seats] = True
        return Selection(keep, features=view.features[seats] + 0.5, size=torch.tensor([2.0, 1.0, 1.0]))

    logits, _, run = generate(model, inputs, Given((PromptStage(select, "contiguous"),)))
    with torch.no_grad():
        encoded = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    encoded = replace(encoded, pooler_output=[encoded.pooler_output[0][seats] + 0.5])
    ids = inputs["input_ids"]
    visual = (ids[0] == model.config.image_token_id).nonzero().flatten()
    short = ids[:, [i for i in range(ids.shape[1]) if i not in visual[3:].tolist()]]
    out = model.generate(
        input_ids=short,
        mm_encoder_outputs={"image": encoded},
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    torch.testing.assert_close(logits, torch.stack(out.logits), atol=2e-5, rtol=1e-5)
    assert run.visual_tokens_kept == [3]
    assert run.stages[0].merged_into is None


@pytest.mark.parametrize("features", [torch.zeros(2, 32), torch.zeros(3, 31)])
def test_contents_that_do_not_fit_their_seats_are_refused(features: Tensor) -> None:
    def select(view) -> Selection:
        keep = torch.zeros_like(view.candidates)
        keep[:3] = True
        return Selection(keep, features)

    with pytest.raises(UsageError, match="3 seats are kept"):
        generate(_model("llava"), one_image("llava"), Given((PromptStage(select),)))


@families
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_own_projections_are_what_the_layer_computes(family: str, positions: str) -> None:
    model, inputs = _model(family), one_image(family)
    own: dict[str, Any] = {}

    def thin(view) -> Tensor:
        return (view.image_of < 0) | (view.token_of % 2 == 0)

    def keep_all(view) -> Tensor:
        own["call"] = view.signal
        return torch.ones_like(view.image_of, dtype=torch.bool)

    stages = (
        LanguageStage(1, None, lambda call: None, thin, positions),  # pyright: ignore[reportArgumentType]
        LanguageStage(3, 3, lambda call: call, keep_all, positions),  # pyright: ignore[reportArgumentType]
        LanguageStage(4, 3, lambda call: own.setdefault("real", call), lambda v: v.image_of == v.image_of),
    )
    generate(model, inputs, Given(stages), max_new_tokens=2)
    call, real = own["call"], own["real"]
    torch.testing.assert_close(call.query, real.query[:, :, -1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(call.key, real.key, atol=1e-5, rtol=1e-5)
    assert call.scale == real.scale
    torch.testing.assert_close(call.rows(torch.tensor([0])), real.rows(torch.tensor([-1])), atol=1e-6, rtol=1e-5)


def test_a_language_stage_may_give_columns_new_contents() -> None:
    model, inputs = _model("llava"), one_image("llava")
    seen: dict[str, Tensor] = {}

    def select(view) -> LanguageSelection:
        keep = (view.image_of < 0) | (view.token_of < 4)
        hidden = view.hidden.clone()
        hidden[view.image_of >= 0] *= 2.0
        seen["expected"] = hidden[:, keep[0]]
        return LanguageSelection(keep, hidden)

    layer = model.model.language_model.layers[2]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.setdefault("entered", args[0]))
    stage = LanguageStage(2, None, lambda call: None, select)
    with handle:
        generate(model, inputs, Given((stage,)), max_new_tokens=1)
    # this hook came first, so it saw the full prompt; the next layer sees the short one
    assert seen["entered"].shape[1] == inputs["input_ids"].shape[1]
    with attach(model, Given((stage,))) as session, torch.no_grad():
        inner = model.model.language_model.layers[2].register_forward_pre_hook(
            lambda module, args: seen.__setitem__("after", args[0])
        )
        with inner:
            model(**inputs)
    torch.testing.assert_close(seen["after"], seen["expected"])
    assert session.last_run is not None
    assert session.last_run.visual_tokens_kept == [4]


def test_a_logit_bias_of_log_two_counts_a_key_twice() -> None:
    from vislm.lmm.decoder.attention import AttentionCall

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 8, generator=generator) for _ in range(3))
    bias = torch.zeros(1, 1, 6, 6)
    bias[..., 2] = torch.log(torch.tensor(2.0))
    mask = add_to_mask(None, bias, True, torch.float32)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    order = [0, 1, 2, 2, 3, 4, 5]
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[:, order]
    twice = torch.nn.functional.scaled_dot_product_attention(query, key[:, :, order], value[:, :, order], causal)
    torch.testing.assert_close(out, twice)
    rows = AttentionCall(query, key, value, mask, False, 8**-0.5).rows(torch.tensor([5]))
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 2, 1))


@families
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_the_bias_sees_every_key_of_every_layer(family: str, options: dict) -> None:
    model, inputs = _model(family), one_image(family)
    shapes: list[tuple[int, int, int]] = []

    def bias(view: BiasView) -> Tensor:
        keys = view.cos.shape[1]
        shapes.append((view.layer, view.queries, keys))
        assert view.size.shape == (options.get("num_beams", 1), keys)
        return torch.zeros(1, 1, view.queries, keys)

    thin = LanguageStage(2, None, lambda call: None, lambda v: (v.image_of < 0) | (v.token_of < 5))
    plain, _, run = generate(model, inputs, Given((thin,)), **options)
    biased, _, _ = generate(model, inputs, Given((thin, BiasStage(bias))), **options)
    torch.testing.assert_close(plain, biased, atol=2e-5, rtol=1e-5)
    prefill = [keys for layer, queries, keys in shapes if queries > 1]
    assert prefill == run.layer_tokens[2:]  # the layers before have lost nothing
    last = [keys for layer, queries, keys in shapes[-3:]]
    assert last == [n + 5 for n in run.layer_tokens[2:]]


def test_sizes_reach_the_bias() -> None:
    model, inputs = _model("llava"), one_image("llava")
    sizes: list[Tensor] = []

    def select(view) -> Selection:
        keep = torch.zeros_like(view.candidates)
        keep[[3, 5]] = True
        return Selection(keep, view.features[:2], torch.tensor([10.0, 6.0]), torch.tensor([0] * 10 + [1] * 6))

    def bias(view: BiasView) -> Tensor:
        sizes.append(view.size)
        return view.size.log()[:, None, None, :].expand(-1, 1, view.queries, -1)

    _, _, run = generate(model, inputs, Given((PromptStage(select), BiasStage(bias))), max_new_tokens=2)
    assert sizes[0].tolist() == [[1.0, 1.0, 1.0, 10.0, 6.0, 1.0, 1.0, 1.0]]
    assert sizes[-1].tolist() == [[1.0, 1.0, 1.0, 10.0, 6.0, 1.0, 1.0, 1.0, 1.0]]
    assert run.stages[0].merged_into == [[0] * 10 + [1] * 6]


def test_a_thinned_tower_cannot_be_recorded() -> None:
    from vislm import FlowCut

    stage = PromptStage(lambda view: view.candidates, needs_tower=True, positions="contiguous")
    with (
        pytest.raises(PlanConflict, match="needs the whole vision tower's signals, but flowcut prunes it"),
        attach(_model("llava"), FlowCut(keep=4), Given((stage,))),
    ):
        pass
