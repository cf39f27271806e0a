"""Decode steps whose one row is edited: without the fused call where nothing is left of it, else beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import generate, mixed_batch, one_image
from torch import Tensor

from vislm import VHR, FastV, attach
from vislm.lmm.decoder import attention, grouped_heads
from vislm.lmm.decoder.key_groups import KeyGroups
from vislm.lmm.interventions import EditStage, EditView


@dataclass(frozen=True)
class Given:
    """A method made of given stages."""

    stages: tuple
    name: str = "given"

    def plan(self, adapter) -> tuple:
        return self.stages


LAYERS = frozenset(range(5))


def towards_the_image(view: EditView) -> Tensor:
    return view.softmax(view.logits + view.keys.factors(1.0, -0.5, 0.0))


@pytest.fixture
def fused(monkeypatch) -> list[int]:
    """The numbers of queries of the fused calls in the language model."""
    calls, original = [], attention.sdpa_attention_forward

    def count(module, query, *args, **kwargs):
        if getattr(module, "is_causal", True):  # not the vision tower's
            calls.append(query.shape[2])
        return original(module, query, *args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", count)
    return calls


@pytest.mark.parametrize(
    ("stage", "steps"),
    [
        (EditStage(LAYERS, towards_the_image), 0),
        (EditStage(frozenset({1, 3}), towards_the_image), 3),
        (EditStage(LAYERS, lambda view: None), 5),
        (EditStage(LAYERS, towards_the_image, heads=lambda layer: [2]), 5),
        (EditStage(LAYERS, towards_the_image, heads=lambda layer: []), 5),
    ],
    ids=["all heads", "two layers", "left alone", "one head", "no head"],
)
def test_the_fused_call_is_made_only_where_something_is_left_of_it(stage: EditStage, steps: int, fused) -> None:
    generate(models.llava(), one_image("llava"), Given((stage,)), max_new_tokens=3)
    prompt = one_image("llava")["input_ids"].shape[1]
    assert fused == [prompt] * 5 + [1] * (2 * steps)


def test_samples_without_images_keep_the_fused_output(fused) -> None:
    batch, singles = mixed_batch()
    model, method = models.llava(), Given((EditStage(LAYERS, towards_the_image),))
    together, _, _ = generate(model, batch, method)
    assert fused.count(1) == 5 * 5
    plain, _, _ = generate(model, batch)
    assert torch.equal(together[:, 2], plain[:, 2])
    for row, single in enumerate(singles):
        alone, _, _ = generate(model, single, method)
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("heads", [None, (0, 3), (2,)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_row_gives_what_several_rows_at_once_give(heads: Any, kv_heads: int) -> None:
    """Feeding the answer's words one by one edits single rows; feeding all of them edits rows of one call."""
    model, inputs = models.llava(kv_heads=kv_heads), one_image("llava")
    chosen: Callable[[int], tuple[int, ...]] | None = None if heads is None else lambda layer: heads
    method = Given((EditStage(LAYERS, towards_the_image, "all", chosen),))
    logits, out, _ = generate(model, inputs, method, max_new_tokens=4)
    words = out.sequences[:, -4:]
    with attach(model, method), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        at_once = model(input_ids=words[:, :3], past_key_values=cache).logits
    torch.testing.assert_close(at_once[0], logits[1:, 0], atol=1e-4, rtol=1e-4)


def test_inference_mode_leaves_nothing_behind_that_gradients_cannot_use() -> None:
    model, inputs = models.llava(), one_image("llava")
    method = Given((EditStage(LAYERS, towards_the_image, "all", lambda layer: (1, 2)),))

    def step() -> Tensor:
        with attach(model, method):
            cache = model(**inputs, use_cache=True).past_key_values
            return model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits

    grouped_heads.head_index.cache_clear()
    with torch.inference_mode():
        first = step()
    again = step()
    torch.testing.assert_close(again, first)
    again.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_head_factors_act_behind_the_edit() -> None:
    """VHR scales the edited output; in its text-only stream nothing is edited."""
    model, inputs = models.llava(), one_image("llava")
    method = Given((EditStage(LAYERS, towards_the_image),))
    edited, _, _ = generate(model, inputs, method)
    both, _, run = generate(model, inputs, method, VHR(alpha=2.0))
    neutral, _, _ = generate(model, inputs, method, VHR(alpha=1.0))
    assert torch.equal(edited, neutral)
    assert run is not None
    assert run.head_factors
    assert (both - edited).abs().max() > 1e-3


@dataclass(frozen=True)
class Watching:
    """Keeps the last row's weights of every layer and step."""

    seen: list[Tensor]
    name: str = "watching"

    def plan(self, adapter) -> list[EditStage]:
        return [EditStage(LAYERS, self.look, every_sample=True, observes=True)]

    def look(self, view: EditView) -> None:
        self.seen.append(view.softmax())


def silence(view: EditView) -> Tensor:
    return torch.zeros_like(view.logits)


@pytest.mark.parametrize("rows", ["last", "all"])
def test_observers_see_what_the_others_leave(rows: Any) -> None:
    batch, _ = mixed_batch()
    model, before, after = models.llava(), Watching([]), Watching([])
    generate(model, batch, before, max_new_tokens=3)
    some = Given(
        (EditStage(frozenset({1}), silence, rows, lambda layer: [2]), EditStage(frozenset({3}), silence, rows))
    )
    generate(model, batch, after, some, max_new_tokens=3)
    assert len(before.seen) == len(after.seen) == 5 * 3
    for place, (old, new) in enumerate(zip(before.seen, after.seen, strict=True)):
        layer = place % 5
        sums = new.sum(-1)[:, :, 0]
        expected = torch.ones_like(sums)
        if layer == 1:
            expected[:2, 2] = 0.0
        if layer == 3:
            expected[:2] = 0.0
        torch.testing.assert_close(sums, expected)
        if place in (0, 1):  # nothing has changed yet but what was silenced
            counts = expected[..., None, None] > 0
            torch.testing.assert_close(torch.where(counts, old, 0.0), new, atol=1e-5, rtol=1e-4)


@given(
    groups=st.sampled_from([(4, 4), (4, 2), (6, 1), (6, 3)]),
    rows=st.integers(1, 3),
    keys=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    wide=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_grouped_products_equal_those_with_repeated_keys(groups, rows: int, keys: int, dtype, wide: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    total, shared = groups
    cached = torch.randn(2, shared, keys, 8, generator=generator).to(dtype)
    query, weights = (torch.randn(2, total, rows, n, generator=generator) for n in (8, keys))
    repeated = cached.float().repeat_interleave(total // shared, 1)
    before, grouped_heads.WIDE = grouped_heads.WIDE, wide
    try:
        for heads in (None, (0,), (total - 1, 0, 1), tuple(range(total))):
            index = list(range(total) if heads is None else heads)
            expected = query[:, index] @ repeated[:, index].mT
            torch.testing.assert_close(grouped_heads.products(query, cached, heads), expected, atol=1e-5, rtol=1e-5)
            mixed = grouped_heads.mixtures(weights[:, index], cached, total, heads)
            torch.testing.assert_close(mixed, weights[:, index] @ repeated[:, index], atol=1e-5, rtol=1e-5)
    finally:
        grouped_heads.WIDE = before


@given(seed=st.integers(0, 99), new=st.integers(0, 4))
def test_extended_groups_equal_those_of_all_keys(seed: int, new: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pad, first, end = (int(n) for n in torch.randint(0, 4, (3,), generator=generator))
    row = [-1] * (pad + 1 + first) + [0, 0, -1, 1] + [-1] * end
    image_of = torch.tensor([row, [-1] * len(row)])
    valid = torch.arange(len(row)).expand(2, -1) >= torch.tensor([[pad], [0]])

    def longer(mask: Tensor, value: Any) -> Tensor:
        return torch.cat([mask, mask.new_full((2, new), value)], 1)

    short = KeyGroups(image_of, image_of, valid, len(row))
    whole = KeyGroups(longer(image_of, -1), longer(image_of, -1), longer(valid, True), len(row))
    extended = short.extended(len(row) + new)
    assert extended.count == len(row) + new
    for name in ("image_of", "token_of", "valid", "image", "before", "after", "generated", "first"):
        assert torch.equal(getattr(extended, name), getattr(whole, name)), name
    expected = torch.where(whole.image, 2.0, torch.where(whole.before, 3.0, 4.0))[:, None, None]
    assert torch.equal(extended.factors(2.0, 3.0, 4.0), expected)
    assert extended.factors(2.0, 3.0, 4.0) is extended.factors(2.0, 3.0, 4.0)


def test_a_pruned_prompt_keeps_its_own_groups() -> None:
    """FastV leaves fewer keys behind its layer: both kinds of layers are edited by their own groups at every step."""
    model, inputs = models.llava(), one_image("llava")
    seen: list[tuple[int, int, int]] = []

    def look(view: EditView) -> None:
        seen.append((view.layer, int(view.keys.image.sum()), view.keys.count))

    generate(model, inputs, FastV(keep=5), Given((EditStage(LAYERS, look),)), max_new_tokens=3)
    text = inputs["input_ids"].shape[1] - models.PATCHES
    for place, (layer, images, keys) in enumerate(seen):
        step, expected = place // 5, models.PATCHES if layer < 2 else 5
        assert (images, keys) == (expected, text + expected + step)
