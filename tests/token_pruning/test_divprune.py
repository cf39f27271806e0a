"""DivPrune against a brute-force selection, and in the session."""

from __future__ import annotations

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import families, generate, one_image

from vislm.token_pruning.divprune import ROWS, DivPrune, cosine_distance, max_min_diversity


def brute_force(tokens: torch.Tensor, count: int) -> list[int]:
    distance = cosine_distance(tokens, tokens)
    selected: list[int] = []
    for _ in range(count):
        best, chosen = -2.0, -1
        for j in range(len(tokens)):
            if j in selected:
                continue
            others = selected or [i for i in range(len(tokens)) if i != j]
            nearest = min(float(distance[i, j]) for i in others)
            if nearest > best:
                best, chosen = nearest, j
        selected.append(chosen)
    return selected


@given(n=st.integers(2, 12), c=st.integers(2, 5), count=st.integers(1, 12), seed=st.integers(0, 999))
def test_the_order_is_that_of_a_brute_force_search(n: int, c: int, count: int, seed: int) -> None:
    tokens = torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    assert max_min_diversity(tokens, count).tolist() == brute_force(tokens, min(n, count))


def test_more_tokens_than_rows_held_at_once() -> None:
    tokens = torch.randn(ROWS + 70, 8, generator=torch.Generator().manual_seed(0))
    distance = cosine_distance(tokens, tokens)
    distance.fill_diagonal_(torch.inf)
    assert int(max_min_diversity(tokens, 1)) == int(distance.min(0).values.argmax())


def test_equal_tokens_are_selected_once() -> None:
    tokens = torch.eye(4).repeat(3, 1)
    assert sorted(i % 4 for i in max_min_diversity(tokens, 4).tolist()) == [0, 1, 2, 3]
    assert sorted(max_min_diversity(tokens, 12).tolist()) == list(range(12))


@families
def test_keeping_all_changes_nothing(family: str) -> None:
    from running import FAMILIES

    model, inputs = FAMILIES[family](), one_image(family)
    plain, _, _ = generate(model, inputs)
    pruned, _, _ = generate(model, inputs, DivPrune(keep=1.0))
    assert torch.equal(plain, pruned)


def test_newlines_are_candidates_or_dropped() -> None:
    model, inputs = models.llava_next(), one_image("llava_next")
    total = int((inputs["input_ids"] == models.IMAGE_TOKEN).sum())
    _, _, run = generate(model, inputs, DivPrune(keep=0.5))
    assert run.visual_tokens_kept == [round(0.5 * total)]
    _, _, run = generate(model, inputs, DivPrune(keep=1.0, newlines=False))
    assert run.visual_tokens_kept == [total - 8]


def test_a_batch_gives_what_its_samples_give_alone() -> None:
    model = models.llava()
    prompts = [models.prompt(7, 8), models.prompt(9)]
    pixels = models.pixels(2)
    together, _, _ = generate(model, {**models.left_pad(*prompts), "pixel_values": pixels}, DivPrune(keep=5))
    for i, ids in enumerate(prompts):
        alone, _, _ = generate(model, {"input_ids": ids, "pixel_values": pixels[i : i + 1]}, DivPrune(keep=5))
        torch.testing.assert_close(together[:, i], alone[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    logits, _, run = generate(models.llava(dtype=dtype), one_image("llava", dtype=dtype), DivPrune(keep=4))
    assert bool(logits.isfinite().all())
    assert run.visual_tokens_kept == [4]
