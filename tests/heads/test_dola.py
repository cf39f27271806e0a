"""DoLa's equations, and the session against explicit hidden states."""

from __future__ import annotations

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import generate, mixed_batch, one_image

from vislm import attach, registry
from vislm.errors import PlanConflict, UsageError
from vislm.heads.dola import DoLa, candidate_layers, choose, contrast, divergence
from vislm.token_pruning.divprune import DivPrune


def test_candidates() -> None:
    assert candidate_layers(32, "low") == tuple(range(0, 16, 2))
    assert candidate_layers(32, "high") == tuple(range(16, 32, 2))
    assert candidate_layers(32, "low", tied=True) == tuple(range(2, 16, 2))
    assert candidate_layers(4, "low", tied=True) == (2,)
    assert candidate_layers(1, "high") == (0,)


@given(seed=st.integers(0, 50))
def test_divergence(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(3, 7, generator=generator).mul(3).double().softmax(-1) for _ in range(2))
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    torch.testing.assert_close(divergence(p.log(), q.log()), expected)
    torch.testing.assert_close(divergence(q.log(), p.log()), expected)
    assert (divergence(p.log(), p.log()).abs() < 1e-12).all()


def test_divergence_of_disjoint_distributions() -> None:
    p, q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    assert divergence(p, q).item() == pytest.approx(0.6931472)


def test_the_layer_is_chosen_for_each_sample() -> None:
    final = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    early = torch.tensor([[[0.5, 0.5], [0.9, 0.1]], [[0.1, 0.9], [0.5, 0.5]]]).log()
    assert choose(final, early).tolist() == [1, 0]
    scores = contrast(final, early[0], 0.2)
    assert scores.isneginf().tolist() == [[False, True], [True, False]]
    assert scores[0, 0].item() == pytest.approx(0.5877867)
    assert not contrast(final, early[0], 0.0).isneginf().any()


@pytest.mark.parametrize("method", [DoLa(), DoLa(bucket="high", relative_top=0.01), DoLa(layers=(1, 3, 4))])
def test_session_equals_explicit_hidden_states(method: DoLa) -> None:
    model = models.llava(layers=8)
    inputs = one_image("llava")
    candidates = method.layers or candidate_layers(8, method.bucket)
    logits, out, run = generate(model, inputs, method, max_new_tokens=8)
    for step in range(8):
        ids = out.sequences[:, : inputs["input_ids"].shape[1] + step]
        with torch.no_grad():
            plain = model(input_ids=ids, pixel_values=inputs["pixel_values"], output_hidden_states=True)
            early = [model.lm_head(model.model.language_model.norm(plain.hidden_states[n][:, -1])) for n in candidates]
        p = plain.logits[0, -1].softmax(-1)
        others = [e[0].softmax(-1) for e in early]
        middle = [(p + q) / 2 for q in others]
        distance = [
            ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()).item() for q, m in zip(others, middle, strict=True)
        ]
        best = distance.index(max(distance))
        expected = (p / others[best]).log().masked_fill(p < method.relative_top * p.max(), -torch.inf)
        assert run.memory[0]["layers"][step] == [candidates[best]]
        torch.testing.assert_close(logits[step, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_a_batch_gives_what_its_samples_give(options: dict) -> None:
    """Those without an image too."""
    model, (batch, singles) = models.llava(), mixed_batch()
    logits, out, _ = generate(model, batch, DoLa(), DivPrune(keep=5), **options)
    plain, _, _ = generate(model, batch, DivPrune(keep=5), **options)
    for row, single in enumerate(singles):
        _, alone, _ = generate(model, single, DoLa(), DivPrune(keep=5), **options)
        assert torch.equal(out.sequences[row, -6:], alone.sequences[0, -6:])
    assert not torch.equal(logits[0, -1], plain[0, -1])


def test_no_candidates_are_bit_identical() -> None:
    model, inputs = models.llava(), one_image("llava")
    plain, _, _ = generate(model, inputs)
    same, _, _ = generate(model, inputs, DoLa(layers=()))
    assert torch.equal(plain, same)


def test_bfloat16_has_no_nan() -> None:
    model, inputs = models.llava(dtype=torch.bfloat16), one_image("llava", dtype=torch.bfloat16)
    logits, _, _ = generate(model, inputs, DoLa())
    assert not logits.isnan().any()


def test_refusals() -> None:
    model = models.llava()
    with pytest.raises(UsageError, match="relative_top=2"), attach(model, DoLa(relative_top=2.0)):
        pass
    with pytest.raises(UsageError, match="bucket='middle'"), attach(model, DoLa(bucket="middle")):  # pyright: ignore[reportArgumentType]
        pass
    with pytest.raises(PlanConflict, match=r"dola reads of decoder layers \[9\]"), attach(model, DoLa(layers=(9,))):
        pass


def test_options_by_name() -> None:
    assert registry.build("heads", "dola:bucket=high,relative_top=0.2") == DoLa("high", relative_top=0.2)
    assert registry.build("heads", "dola:layers=0+2-4") == DoLa(layers=(0, 2, 3, 4))
