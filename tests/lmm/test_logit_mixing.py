"""Changed next-token logits against two explicit runs of the model without any cache."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import families
import models
import pytest
import torch
from running import GENERATE, KeepGiven, generate, mixed_batch, one_image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vislm import FastV, FlowCut, attach
from vislm.errors import PlanConflict, UsageError
from vislm.heads.pai import PAI, guide
from vislm.lmm.interventions import LogitsStage, LogitsView


@dataclass(frozen=True)
class Mix:
    """l + 0.7 (l - l'), l' of the contrast stream."""

    contrast: Any = "text_only"
    shift: float = 0.5
    name: str = "mix"

    def plan(self, adapter) -> list[LogitsStage]:
        pixels = (lambda values, memory: values * -1.0 + self.shift) if self.contrast == "pixels" else None
        return [LogitsStage(self.adjust, contrast=self.contrast, pixels=pixels)]

    def adjust(self, view: LogitsView) -> Tensor:
        assert view.contrast is not None
        return mixed(view.logits, view.contrast)


def mixed(logits: Tensor, contrast: Tensor) -> Tensor:
    return logits + 0.7 * (logits - contrast)


KINDS = pytest.mark.parametrize("contrast", ["text_only", "pixels"])


def explicit(model, contrast: str, ids: Tensor, pixels: Tensor) -> Tensor:
    """The mixed logits (B, V) behind whole sequences ids (B, T), one image in each, by two runs without a cache."""
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[:, -1]
        if contrast == "pixels":
            other = model(input_ids=ids, pixel_values=pixels * -1.0 + 0.5, use_cache=False).logits[:, -1]
        else:
            text = ids[ids != models.IMAGE_TOKEN].unflatten(0, (len(ids), -1))
            other = model(input_ids=text, use_cache=False).logits[:, -1]
    return mixed(logits, other)


class Explicit(LogitsProcessor):
    """Puts the mixed logits in the place of what the model gave."""

    def __init__(self, model, contrast: str, pixels: Tensor) -> None:
        self.model, self.contrast, self.pixels = model, contrast, pixels

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        pixels = self.pixels.repeat_interleave(len(input_ids) // len(self.pixels), 0)
        return explicit(self.model, self.contrast, input_ids, pixels).log_softmax(-1)


@KINDS
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
)
def test_equals_two_explicit_runs(contrast: str, options: dict) -> None:
    model = models.llava()
    ids = torch.cat([models.prompt(7, 8, 9), models.prompt(9, 8, 7)])
    inputs = {"input_ids": ids, "pixel_values": models.pixels(2)}
    call = {**GENERATE, "max_new_tokens": 8, "output_scores": True, **options}
    torch.manual_seed(3)
    reference = Explicit(model, contrast, inputs["pixel_values"])
    expected = model.generate(**inputs, **call, logits_processor=LogitsProcessorList([reference]))
    torch.manual_seed(3)
    with attach(model, Mix(contrast)) as session:
        out = model.generate(**inputs, **call)
    plain = model.generate(**inputs, **GENERATE)
    assert torch.equal(out.sequences, expected.sequences)
    theirs = torch.stack(expected.scores)
    torch.testing.assert_close(torch.stack(out.logits).log_softmax(-1), theirs, atol=1e-4, rtol=1e-5)
    assert (torch.stack(plain.logits)[0, 0].log_softmax(-1) - theirs[0, 0]).abs().max() > 1e-2
    run = session.last_run
    assert run.flops["contrast_prefill"] > 0
    assert run.flops["contrast_decode"] > 0
    assert run.seconds["contrast_decode"] > 0.0
    assert run.contrast_kv_bytes > 0


@KINDS
def test_leaving_the_logits_alone_is_bit_identical(contrast: str, monkeypatch) -> None:
    monkeypatch.setattr(Mix, "adjust", lambda self, view: view.logits)
    model = models.llava()
    batch, _ = mixed_batch()
    for options in ({}, {"num_beams": 3}):
        plain, _, _ = generate(model, batch, **options)
        same, _, _ = generate(model, batch, Mix(contrast), **options)
        assert torch.equal(plain, same)


@KINDS
@pytest.mark.parametrize(
    "pruner", [(), (FlowCut(keep=5, tower_keep=6),), (FastV(keep=5),)], ids=["", "flowcut", "fastv"]
)
def test_a_batch_gives_what_its_samples_give(contrast: str, pruner: tuple) -> None:
    model = models.llava()
    batch, singles = mixed_batch()
    logits, _, _ = generate(model, batch, *pruner, Mix(contrast))
    plain, _, _ = generate(model, batch, *pruner)
    for row, single in enumerate(singles):
        alone, _, _ = generate(model, single, *pruner, Mix(contrast))
        torch.testing.assert_close(logits[:, row], alone[:, 0], atol=1e-4, rtol=1e-4)
    assert torch.equal(logits[:, 2], plain[:, 2])  # no image
    assert (logits[0, :2] - plain[0, :2]).abs().max() > 1e-2


def test_the_stream_reads_the_full_prompt_without_interventions() -> None:
    """Pruned to nearly nothing, the real stream changes and the contrast stays that of the full prompt."""
    model, inputs, seen = models.llava(), one_image("llava"), []

    @dataclass(frozen=True)
    class Watch(Mix):
        def adjust(self, view: LogitsView) -> Tensor:
            seen.append(view.contrast)
            return view.logits

    for pruner in ((), (KeepGiven((3,)),), (FlowCut(keep=2, where="both", tower_keep=4),), (FastV(keep=2),)):
        generate(model, inputs, *pruner, Watch("pixels", name="watch"), max_new_tokens=1)
    assert all(torch.equal(seen[0], other) for other in seen[1:])


class Force(LogitsProcessor):
    """Lets ``generate`` write given tokens (t,)."""

    def __init__(self, prompt: int, tokens: Tensor) -> None:
        self.prompt, self.tokens = prompt, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.tokens[input_ids.shape[1] - self.prompt]
        return torch.full_like(scores, -torch.inf).index_fill_(1, chosen[None], 0.0)


def forced(model, inputs: dict, tokens: Tensor) -> Tensor:
    """The plain model's logits (t, V) at each step of a given answer."""
    processors = LogitsProcessorList([Force(inputs["input_ids"].shape[1], tokens)])
    out = model.generate(**inputs, **{**GENERATE, "max_new_tokens": len(tokens)}, logits_processor=processors)
    return torch.cat(out.logits)


every_family = pytest.mark.parametrize("family", families.FAMILIES)


def without_images(inputs: dict) -> dict:
    ids = inputs["input_ids"]
    return {"input_ids": ids[(ids != families.IMAGE) & (ids != families.VIDEO)][None]}


@every_family
@KINDS
def test_every_family_equals_two_generations(family: str, contrast: str) -> None:
    model, picture = families.build(family), families.FAMILIES[family].picture
    inputs = families.inputs(family, ([picture(0, 0)], [7, 8, 9]))
    other = {**inputs, "pixel_values": inputs["pixel_values"] * -1.0 + 0.5}
    logits, out, _ = generate(model, inputs, Mix(contrast), max_new_tokens=5)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
    second = forced(model, without_images(inputs) if contrast == "text_only" else other, tokens)
    first = forced(model, inputs, tokens)
    torch.testing.assert_close(logits[:, 0], mixed(first, second), atol=2e-4, rtol=1e-4)
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl", "internvl", "idefics3"])
@KINDS
def test_families_in_batches_and_beams(family: str, contrast: str) -> None:
    """One image, two images of other shapes, none; left padding."""
    model, picture = families.build(family), families.FAMILIES[family].picture
    prompts = [([picture(0, 0)], [7, 8, 9]), ([picture(1, 1), picture(2, 2)], [7]), ([], [9, 10, 11])]
    batch = families.inputs(family, *prompts)
    for options in ({}, {"num_beams": 2}):
        logits, out, _ = generate(model, batch, Mix(contrast), max_new_tokens=4, **options)
        for row, prompt in enumerate(prompts):
            single = families.inputs(family, prompt)
            alone, one, _ = generate(model, single, Mix(contrast), max_new_tokens=4, **options)
            assert torch.equal(out.sequences[row, -4:], one.sequences[0, -4:])
            if not options:
                torch.testing.assert_close(logits[:, row], alone[:, 0], atol=2e-4, rtol=1e-4)


def test_videos() -> None:
    for family in ("llava_onevision", "qwen2_vl", "qwen3_vl"):
        model, known = families.build(family), families.FAMILIES[family]
        inputs = families.inputs(family, ([known.video(0)], [7, 8, 9]))
        changed = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"] * -1.0 + 0.5}
        logits, out, _ = generate(model, inputs, Mix("pixels"), max_new_tokens=3)
        tokens = out.sequences[0, -3:]
        expected = mixed(forced(model, inputs, tokens), forced(model, changed, tokens))
        torch.testing.assert_close(logits[:, 0], expected, atol=2e-4, rtol=1e-4)


@KINDS
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_static_caches(contrast: str, options: dict) -> None:
    model = models.llava()
    batch, _ = mixed_batch()
    dynamic, one, _ = generate(model, batch, Mix(contrast), **options)
    static, two, _ = generate(model, batch, Mix(contrast), cache_implementation="static", **options)
    torch.testing.assert_close(dynamic, static, atol=1e-4, rtol=1e-4)
    assert torch.equal(one.sequences, two.sequences)


@KINDS
def test_assisted_decoding_contrasts_every_row_that_it_reads(contrast: str) -> None:
    model, inputs = models.llava(), one_image("llava")
    _, plain, _ = generate(model, inputs, Mix(contrast), max_new_tokens=12)
    _, assisted, _ = generate(model, inputs, Mix(contrast), max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, assisted.sequences)


@KINDS
def test_the_model_called_step_by_step(contrast: str) -> None:
    """Right results without generate, from pixels; all other rows of the prefill stay as they are."""
    model, inputs = models.llava(), one_image("llava")
    expected, out, _ = generate(model, inputs, Mix(contrast))
    plain = model(**inputs).logits
    with torch.no_grad(), attach(model, Mix(contrast)):
        step = model(**inputs, use_cache=True)
        assert torch.equal(step.logits[:, :-1], plain[:, :-1])
        torch.testing.assert_close(step.logits[:, -1], expected[0], atol=1e-5, rtol=1e-5)
        for number in (1, 2):
            token = out.sequences[:, inputs["input_ids"].shape[1] + number - 1][:, None]
            step = model(input_ids=token, past_key_values=step.past_key_values, use_cache=True)
            torch.testing.assert_close(step.logits[:, -1], expected[number], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(**inputs, use_cache=False).logits[:, -1], expected[0], atol=1e-5, rtol=1e-5)


def test_a_conversation_goes_on_with_the_same_cache() -> None:
    model, inputs = models.llava(), one_image("llava")
    more = torch.tensor([[11, 12, 13]])
    with attach(model, Mix()):
        first = model.generate(**inputs, **GENERATE)
        longer = torch.cat([first.sequences, more], 1)
        second = model.generate(input_ids=longer, past_key_values=first.past_key_values, **GENERATE)
    ids, logits = second.sequences, torch.cat(second.logits)
    for step in range(GENERATE["max_new_tokens"]):
        end = longer.shape[1] + step
        expected = explicit(model, "text_only", ids[:, :end], inputs["pixel_values"])
        torch.testing.assert_close(logits[step : step + 1], expected, atol=1e-4, rtol=1e-4)


def test_a_foreign_cache_is_refused() -> None:
    model, inputs = models.llava(), one_image("llava")
    with torch.no_grad(), attach(model, Mix()) as session:
        out = model.generate(**inputs, **GENERATE)
        token = out.sequences[:, -1:]
        with pytest.raises(UsageError, match="another cache"):
            model(input_ids=token, past_key_values=copy.deepcopy(out.past_key_values))
        with pytest.raises(UsageError, match="new images"):
            model(**inputs, past_key_values=out.past_key_values)
        assert "reorder_cache" in out.past_key_values.__dict__
    assert "reorder_cache" not in out.past_key_values.__dict__
    assert not session._hooks.paused


def test_a_copied_cache_is_reordered_alone() -> None:
    model, inputs = models.llava(), one_image("llava")
    ids = inputs["input_ids"].repeat(2, 1)
    with torch.no_grad(), attach(model, Mix()) as session:
        out = model(input_ids=ids, pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))
        copied = copy.deepcopy(out.past_key_values)
        before = out.past_key_values.layers[0].keys.clone()
        assert session._logits is not None
        assert session._logits.stream is not None
        stream = session._logits.stream.cache.layers[0].keys
        copied.layers[0].keys[1] += 1.0
        copied.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(copied.layers[0].keys[0], copied.layers[0].keys[1])
        assert torch.equal(out.past_key_values.layers[0].keys, before)
        assert session._logits.stream.cache.layers[0].keys is stream


def test_images_encoded_outside_are_refused() -> None:
    model, inputs = models.llava(), one_image("llava")
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    with pytest.raises(UsageError, match="pass pixel_values"), attach(model, Mix("pixels")):
        model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": features})
    with attach(model, Mix("text_only")), torch.no_grad():
        model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": features})


def test_right_padding_and_tuples_are_refused() -> None:
    model, inputs = models.llava(), one_image("llava")
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, -1] = 0
    with attach(model, Mix()):
        with pytest.raises(UsageError, match="left"):
            model(**inputs, attention_mask=mask)
        with pytest.raises(UsageError, match="return_dict"):
            model(**inputs, return_dict=False)


def test_one_contrast_stream_at_a_time() -> None:
    with (
        pytest.raises(PlanConflict, match=r"mix and other both run a contrast stream"),
        attach(models.llava(), Mix(), Mix(name="other")),
    ):
        pass


def test_gradients_stop_at_the_contrast_stream() -> None:
    model, inputs = models.llava(), one_image("llava")
    with attach(model, Mix()):
        logits = model(**inputs).logits
    assert logits.requires_grad
    logits[:, -1].sum().backward()


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_pai_is_guided_by_the_untouched_text_only_prompt(alpha: float) -> None:
    """The edit of attention acts in the real stream alone."""
    model, inputs = models.llava(), one_image("llava")
    logits, out, _ = generate(model, inputs, PAI(alpha=alpha, gamma=2.0))
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
    second = forced(model, without_images(inputs), tokens)
    with attach(model, PAI(alpha=alpha, gamma=1.0)):
        first = forced(model, inputs, tokens)
    expected = guide(first, second, 2.0)
    assert torch.equal(logits[:, 0].isneginf(), expected.isneginf())
    torch.testing.assert_close(logits[:, 0], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens, expected.argmax(-1))


# -- early layers ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Early:
    """Notes the early logits, and leaves everything alone."""

    layers: tuple[int, ...]
    seen: list = dataclasses.field(default_factory=list)
    name = "early"

    def plan(self, adapter) -> list[LogitsStage]:
        return [LogitsStage(self.adjust, early_layers=self.layers, every_sample=True)]

    def adjust(self, view: LogitsView) -> Tensor:
        self.seen.append(view.early)
        return view.logits


@every_family
def test_early_logits_are_those_of_the_hidden_states(family: str) -> None:
    model, picture = families.build(family), families.FAMILIES[family].picture
    inputs = families.inputs(family, ([picture(0, 0)], [7, 8, 9]), ([], [9, 10]))
    method = Early((0, 2, 4))
    _, out, _ = generate(model, inputs, method, max_new_tokens=3, output_hidden_states=True)
    norm = model.get_submodule(
        "model.text_model" if "text_model" in dict(model.model.named_children()) else "model.language_model"
    ).norm
    for step in range(3):
        assert sorted(method.seen[step]) == [0, 2, 4]
        for layer in (0, 2, 4):
            expected = model.lm_head(norm(out.hidden_states[step][layer][:, -1]))
            torch.testing.assert_close(method.seen[step][layer], expected, atol=1e-4, rtol=1e-4)


def test_early_layers_outside_the_model() -> None:
    with pytest.raises(PlanConflict, match=r"layers \[5\]"), attach(models.llava(), Early((5,))):
        pass


def test_float32_logits_of_a_bfloat16_model() -> None:
    model, inputs = models.llava(dtype=torch.bfloat16), one_image("llava", dtype=torch.bfloat16)
    logits, _, _ = generate(model, inputs, Mix("pixels"))
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
