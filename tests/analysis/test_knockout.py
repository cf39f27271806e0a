"""Knockout in a running model against explicit masks."""

from __future__ import annotations

import analysis_eager as eager
import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import one_image

from vislm import FlowCut, attach
from vislm.analysis.knockout import (
    Knockout,
    cross_frame_pairs,
    frame_spans,
    knockout_mask,
    layers_at,
    relative_change,
    window,
)
from vislm.errors import PlanConflict, UnknownName, UsageError

NEW = 8


def generate(model, inputs, *methods):
    with attach(model, *methods), torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
        )


def blocked(edge: str, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """The pairs (T, T) that an edge cuts, by hand, for one image at columns 3..18 of the prompt."""
    image = ids == models.IMAGE_TOKEN
    place = torch.arange(len(ids))
    last = place == prompt - 1
    question = (place > 18) & (place < prompt - 1)
    before = (place > 0) & (place < 3)
    groups = {"image": image, "last": last, "question": question, "before": before, "bos": place == 0}
    source, target = edge.split(">")
    queries = groups[target] | ((place >= prompt) if target == "last" else False)
    pairs = queries[:, None] & groups[source]
    return pairs & ~torch.eye(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("cut", [("image>last",), ("image>question", "before>image"), ("question>last", "bos>last")])
@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_prefill_and_every_step_equal_explicit_masks(cut, layers) -> None:
    model, inputs = models.llava(), one_image("llava", words=(7, 8, 9, 10))
    out = generate(model, inputs, Knockout(cut, layers))
    prompt = inputs["input_ids"].shape[1]
    for step in range(NEW):
        ids = out.sequences[:, : prompt + step]
        pairs = torch.stack([blocked(edge, ids[0], prompt) for edge in cut]).any(0)

        def edit(logits: torch.Tensor, layer: int, pairs: torch.Tensor = pairs) -> torch.Tensor:
            return logits.masked_fill(pairs, -torch.inf) if layers is None or layer in layers else logits

        expected, _ = eager.forward(model, {**inputs, "input_ids": ids}, edit)
        torch.testing.assert_close(out.logits[step], expected[:, -1], atol=1e-4, rtol=1e-4)


def test_keeping_only_listed_edges() -> None:
    model, inputs = models.llava(), one_image("llava", words=(7, 8, 9))
    out = generate(model, inputs, Knockout(("image>image", "image>last", "text>text"), keep_only=True))
    ids, prompt = inputs["input_ids"][0], inputs["input_ids"].shape[1]
    image, place = ids == models.IMAGE_TOKEN, torch.arange(prompt)
    kept = (image[:, None] & image) | (~image[:, None] & ~image) | ((place == prompt - 1)[:, None] & image)
    kept = kept | torch.eye(prompt, dtype=torch.bool)
    expected, _ = eager.forward(model, inputs, lambda logits, _: logits.masked_fill(~kept, -torch.inf))
    torch.testing.assert_close(out.logits[0], expected[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("per_frame", [None, 4])
def test_frames_do_not_see_earlier_ones(per_frame) -> None:
    model = models.llava()
    inputs = {"input_ids": models.prompt(7, 8, images=2), "pixel_values": models.pixels(2)}
    out = generate(model, inputs, Knockout(("earlier_frames>image",), tokens_per_frame=per_frame))
    length = inputs["input_ids"].shape[1]
    spans = frame_spans(3, 2 if per_frame is None else 8, 16 if per_frame is None else per_frame)
    mask = knockout_mask(length, cross_frame_pairs(spans))
    expected, _ = eager.forward(model, inputs, lambda logits, _: logits.masked_fill(~mask, -torch.inf))
    torch.testing.assert_close(out.logits[0], expected[:, -1], atol=1e-4, rtol=1e-4)


def test_own_groups_are_counted_from_the_end() -> None:
    model, inputs = models.llava(), one_image("llava", words=(7, 8, 9, 10, 11))
    out = generate(model, inputs, Knockout(("options>last",), spans=(("options", -4, -2),)))
    pairs = torch.zeros(24, 24, dtype=torch.bool)
    pairs[-1, 20:22] = True
    expected, _ = eager.forward(model, inputs, lambda logits, _: logits.masked_fill(pairs, -torch.inf))
    torch.testing.assert_close(out.logits[0], expected[:, -1], atol=1e-4, rtol=1e-4)


def test_nothing_to_cut_is_bit_identical() -> None:
    model, inputs = models.llava(), one_image("llava")
    plain = torch.stack(generate(model, inputs).logits)
    for nothing in (Knockout(), Knockout(("image>last",), layers=()), Knockout(("image>bos",))):
        assert torch.equal(torch.stack(generate(model, inputs, nothing).logits), plain)


def test_a_left_padded_batch_gives_what_its_samples_give_alone() -> None:
    model, method = models.llava(), Knockout(("image>question", "image>last", "before>last"))
    prompts = [models.prompt(7, 8, 9, 10), models.prompt(9), torch.tensor([[1, 5, 6, 7, 8]])]
    pixels = models.pixels(2)
    together = torch.stack(generate(model, {**models.left_pad(*prompts), "pixel_values": pixels}, method).logits)
    for sample, ids in enumerate(prompts):
        inputs = {"input_ids": ids, **({} if sample == 2 else {"pixel_values": pixels[sample : sample + 1]})}
        alone = torch.stack(generate(model, inputs, method).logits)
        torch.testing.assert_close(together[:, sample], alone[:, 0], atol=2e-4, rtol=2e-4)


def test_with_a_pruner_and_in_bfloat16() -> None:
    model, inputs = models.llava(dtype=torch.bfloat16), one_image("llava", dtype=torch.bfloat16)
    out = generate(model, inputs, FlowCut(keep=6), Knockout(("image>last",)))
    assert torch.stack(out.logits).isfinite().all()


@given(centre=st.integers(0, 11), width=st.integers(1, 30))
def test_windows_partition_the_layers(centre, width) -> None:
    inside = layers_at(centre, width, 12)
    assert centre in inside
    assert sorted(inside + layers_at(centre, width, 12, "inverse")) == list(range(12))
    assert layers_at(centre, width, 12, "bottom_up")[:-1] + layers_at(centre, width, 12, "top_down") == list(range(12))
    assert len(inside) <= width


def test_windows_as_published() -> None:
    assert list(window(5, 3, 12)) == [4, 5, 6]
    assert list(window(5, 4, 12)) == [3, 4, 5, 6]
    assert list(window(0, 9, 12)) == [0, 1, 2, 3, 4]
    change = relative_change(torch.tensor([0.2, 0.9]), torch.tensor([0.4, 0.6]))
    torch.testing.assert_close(change, torch.tensor([-50.0, 50.0]))


def test_refusals() -> None:
    model, inputs = models.llava(), one_image("llava")
    for method, error, message in (
        (Knockout(("image-last",)), UsageError, "source>target"),
        (Knockout(("image>lst",)), UnknownName, "did you mean 'last'"),
        (Knockout(("earlier_frames>last",)), UsageError, "for the image alone"),
        (Knockout(("image>last",), layers=(9,)), UsageError, "layers 0..4"),
        (Knockout(("a>last",), spans=(("a", 3, 5),)), UsageError, "counted from its end"),
    ):
        with pytest.raises(error, match=message):
            generate(model, inputs, method)
    with pytest.raises(UnknownName, match="mode of layers"):
        layers_at(1, 1, 4, "sideways")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanConflict, match="both edit"):
        from vislm.heads.pai import PAI

        generate(model, inputs, PAI(gamma=1.0), Knockout(("image>last",)))
