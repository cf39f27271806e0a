"""RESTORE's calibration against the formula, and RESTORE's merging."""

from __future__ import annotations

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import FAMILIES, families, generate, one_image

from vislm import FastV, FlowCut, attach
from vislm.errors import PlanConflict
from vislm.lmm.decoder.calibration import calibration, rotary_similarity
from vislm.lmm.interventions import BiasView
from vislm.token_pruning.divprune import DivPrune
from vislm.token_pruning.restore import Restore, anchors, merge_into


def rotary(positions: torch.Tensor, dim: int = 8, base: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    theta = base ** (-torch.arange(0, dim, 2) / dim)
    angle = positions[..., None].float() * theta
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def test_similarity_is_the_mean_cosine_of_the_distance() -> None:
    positions = torch.tensor([[0, 1, 5, 40]])
    cos, sin = rotary(positions)
    theta = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    distance = (positions[0][:, None] - positions[0][None]).abs()
    expected = (distance[..., None] * theta).cos().mean(-1)
    torch.testing.assert_close(rotary_similarity(cos, sin, 4)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_bias_is_the_papers_formula() -> None:
    cos, sin = rotary(torch.arange(6)[None].repeat(2, 1))
    size = torch.tensor([[1.0, 1, 4, 1, 2, 1], [1.0] * 6])
    view = BiasView(0, cos, sin, size, 3, torch.tensor([True, False]))
    bias = calibration(view)
    assert bias.shape == (2, 1, 3, 6)
    d = rotary_similarity(cos, sin, 3)
    torch.testing.assert_close(bias[0, 0], (size[0] * (2.0 - d[0])).log())
    assert float(bias[0, 0, 2, 5]) == pytest.approx(0.0, abs=1e-6)  # own position, nothing merged
    assert not bool(bias[1].any())


@families
@pytest.mark.parametrize("method", [DivPrune(keep=6, calibrate=True), Restore(keep=6), FastV(keep=6)])
def test_decoding_equals_a_prefill_of_the_longer_text(family: str, method) -> None:
    """The bias of a decode step is the last row of the bias of the prompt with that word appended."""
    model, inputs = FAMILIES[family](), one_image(family)
    if isinstance(method, FastV):
        return  # ranks by the last token, so a longer prompt keeps other tokens
    logits, out, _ = generate(model, inputs, method, max_new_tokens=3)
    ids = out.sequences[:, :-1]
    with attach(model, method), torch.no_grad():
        full = model(**{**inputs, "input_ids": ids}, use_cache=True).logits[:, -1]
    torch.testing.assert_close(logits[-1], full, atol=2e-4, rtol=1e-4)


@families
def test_keeping_all_is_never_calibrated(family: str) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    plain, _, _ = generate(model, inputs)
    for method in (DivPrune(keep=1.0, calibrate=True), Restore(keep=1.0)):
        kept, _, run = generate(model, inputs, method)
        if run.visual_tokens_kept == run.visual_tokens:
            assert torch.equal(plain, kept)


def test_a_text_only_sample_is_left_alone() -> None:
    model = models.llava()
    text = torch.tensor([[1, 5, 6, 7, 8]])
    batch = {**models.left_pad(models.prompt(7, 8), text), "pixel_values": models.pixels(1)}
    together, _, _ = generate(model, batch, Restore(keep=4))
    alone, _, _ = generate(model, {"input_ids": text})
    torch.testing.assert_close(together[:, 1], alone[:, 0], atol=1e-4, rtol=1e-4)


def test_calibration_changes_the_answer_and_composes() -> None:
    model, inputs = models.llava(), one_image("llava")
    plain, _, _ = generate(model, inputs, DivPrune(keep=4, positions="original"))
    calibrated, _, _ = generate(model, inputs, DivPrune(keep=4, positions="original", calibrate=True))
    assert not torch.allclose(plain, calibrated, atol=1e-3)
    _, _, run = generate(model, inputs, FlowCut(keep=8, positions="original"), Restore(keep=4, base=DivPrune()))
    assert run.visual_tokens_kept == [4]


@given(n=st.integers(2, 20), k=st.integers(1, 20), seed=st.integers(0, 99))
def test_anchors_are_those_of_the_definition(n: int, k: int, seed: int) -> None:
    tokens = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    correlation = unit @ unit.T
    total = correlation.sum(-1)
    score = []
    for i in range(n):
        superiors = [float(correlation[i, j]) for j in range(n) if float(total[j]) > float(total[i])]
        score.append(float(total[i]) * (1 - max(superiors)) if superiors else float("inf"))
    best = sorted(score, reverse=True)[: min(k, n)]
    chosen = anchors(tokens, min(k, n)).tolist()
    assert chosen == sorted(set(chosen))
    assert sorted((score[i] for i in chosen), reverse=True) == pytest.approx(best, abs=1e-4)


@given(n=st.integers(2, 20), k=st.integers(1, 8), seed=st.integers(0, 99))
def test_merging_keeps_the_sum(n: int, k: int, seed: int) -> None:
    tokens = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    anchor = anchors(tokens, min(k, n))
    means, size, owner = merge_into(tokens, anchor)
    assert float(size.sum()) == n
    assert owner[anchor].tolist() == list(range(len(anchor)))
    torch.testing.assert_close((means * size[:, None]).sum(0), tokens.sum(0), atol=1e-4, rtol=1e-4)


def test_merged_tokens_say_where_they_came_from() -> None:
    model, inputs = models.llava(), one_image("llava")
    _, _, run = generate(model, inputs, Restore(keep=6, base=DivPrune()))
    (merged,) = run.stages[0].merged_into
    assert len(merged) == models.PATCHES
    assert set(merged) == set(range(6))
    assert [merged[i] for i in run.stages[0].index[0]] == list(range(6))


def test_a_base_that_acts_elsewhere_is_refused() -> None:
    with (
        pytest.raises(PlanConflict, match="fastv acts elsewhere"),
        attach(models.llava(), Restore(keep=4, base=FastV())),
    ):
        pass
