"""ACT's sinks and calibration, and the session against explicit matrices."""

from __future__ import annotations

import models
import pytest
import torch
from eager import Prompt, check_against_eager, plain
from hypothesis import given
from hypothesis import strategies as st
from running import generate, mixed_batch, one_image

from vislm import FastV, FlowCut, attach
from vislm.errors import PlanConflict, UsageError
from vislm.heads.act import ACT, calibrate, mean_received, received_by, sink_keys
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import EditStage

HEADS = ((0, 0), (1, 3), (2, 0), (2, 1), (2, 3), (4, 2))
OPTIONS = {"heads": HEADS, "beta": 0.2, "threshold": 0.06}


def causal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    logits = 2.0 * torch.randn(*shape, generator=generator)
    return logits.masked_fill(~torch.ones(shape[-2:], dtype=torch.bool).tril(), -torch.inf).softmax(-1)


@given(seed=st.integers(0, 999), beta=st.floats(0.0, 1.0))
def test_row_sums_stay(seed: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = causal(generator, 2, 3, 8, 8)
    sinks = torch.rand(2, 3, 8, generator=generator) < 0.4
    new = calibrate(weights, sinks, beta)
    torch.testing.assert_close(new.sum(-1), weights.sum(-1))
    assert not new.isnan().any()
    assert torch.equal(calibrate(weights, sinks & False, beta), weights)


def test_padding_is_not_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    alone = causal(generator, 1, 2, 5, 5)
    padded = torch.zeros(1, 2, 8, 8)
    padded[..., 3:, 3:] = alone
    valid = torch.tensor([[False] * 3 + [True] * 5])
    mean = mean_received(padded.sum(2), valid)
    torch.testing.assert_close(mean[..., 3:], mean_received(alone.sum(2), valid[:, 3:]))
    torch.testing.assert_close(mean[0, 0, 4], alone[0, 0, 1:, 1].mean())


def test_which_sink_is_spared() -> None:
    mean, valid = torch.tensor([[[0.0, 0.05, 0.5, 0.2, 0.01]]]), torch.tensor([[False, True, True, True, True]])
    assert sink_keys(mean, valid, 0.1).flatten().nonzero().flatten().tolist() == [3]
    assert sink_keys(mean, valid, 0.1, "first_token").flatten().nonzero().flatten().tolist() == [2, 3]
    assert sink_keys(mean, valid, 0.01, "first_token").flatten().nonzero().flatten().tolist() == [2, 3]


@given(seed=st.integers(0, 99), heads=st.sampled_from([[0], [3, 1], [0, 1, 2, 3]]))
def test_received_attention_is_the_columns_sum(seed: int, heads: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, 6, 8, generator=generator)
    key, value = (torch.randn(2, 2, 6, 8, generator=generator) for _ in range(2))
    rows = torch.rand(2, 6, generator=generator) < 0.6
    call = AttentionCall(query, key, value, None, True, 0.3)
    matrix = call.rows(torch.arange(6))
    expected = (matrix * rows[:, None, :, None]).sum(2)[:, heads]
    torch.testing.assert_close(received_by(call, heads, rows), expected, atol=1e-5, rtol=1e-4)


def test_session_equals_explicit_matrices() -> None:
    touched = []

    def edit(logits, mask, layer):
        weights = plain(logits, mask, layer)
        for listed, head in HEADS:
            if listed != layer:
                continue
            matrix, length = weights[0, head], Prompt.length
            means = [matrix[j:length, j].mean() for j in range(length)]
            sinks = [j for j in range(length) if means[j] > OPTIONS["threshold"]][1:]
            touched.extend(sinks)
            for row in range(1, len(matrix)):
                a = matrix[row].clone()
                others = [k for k in range(len(a)) if k not in sinks]
                matrix[row, sinks] *= OPTIONS["beta"]
                freed = (1 - OPTIONS["beta"]) * a[sinks].sum()
                matrix[row, others] += freed * a[others] / a[others].sum()
        return weights

    check_against_eager(ACT(**OPTIONS), edit)
    assert touched


@pytest.mark.parametrize("options", [{"beta": 1.0}, {"heads": ()}])
def test_neutral_settings_return_no_stages(options) -> None:
    model, inputs = models.llava(), one_image("llava")
    method = ACT(**{**OPTIONS, **options})
    with attach(model, method) as session:
        assert not session.plan.edits
    assert torch.equal(generate(model, inputs)[0], generate(model, inputs, method)[0])


def test_without_sinks_nothing_changes() -> None:
    model, inputs = models.llava(), one_image("llava")
    method = ACT(heads=HEADS, threshold=1.0)
    assert torch.equal(generate(model, inputs)[0], generate(model, inputs, method)[0])


@pytest.mark.parametrize("pruner", [None, FlowCut(keep=9), FastV(keep=8, layer=2)])
def test_a_batch_gives_what_its_samples_give_alone(pruner) -> None:
    model, (batch, singles) = models.llava(), mixed_batch()
    methods = [m for m in (pruner, ACT(**OPTIONS)) if m]
    together, _, _ = generate(model, batch, *methods)
    without, _, _ = generate(model, batch, *methods[:-1])
    for row, single in enumerate(singles):
        alone, _, _ = generate(model, single, *methods)
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=2e-4, rtol=1e-4)
        assert (together[:, row] - without[:, row]).abs().max() > 1e-3  # the third has no image


def test_beams_and_static_caches() -> None:
    model, inputs, method = models.llava(), one_image("llava"), ACT(**OPTIONS)
    dynamic, _, _ = generate(model, inputs, method)
    static, _, _ = generate(model, inputs, method, cache_implementation="static")
    torch.testing.assert_close(static, dynamic, atol=1e-4, rtol=1e-4)
    beams, _, _ = generate(model, inputs, method, num_beams=3, max_new_tokens=1)
    torch.testing.assert_close(beams[0], dynamic[0].expand(3, -1), atol=1e-4, rtol=1e-4)
    assert generate(model, inputs, method, num_beams=3)[1].sequences.shape[0] == 1


def test_half_precision() -> None:
    model = models.llava(dtype=torch.bfloat16)
    logits, _, _ = generate(model, one_image("llava", dtype=torch.bfloat16), ACT(**OPTIONS))
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": None}, "act needs heads="),
        ({"heads": ((9, 0),)}, "lies outside the model"),
        ({"beta": 1.5}, "beta=1.5"),
        ({"threshold": -1.0}, "threshold=-1.0"),
    ],
)
def test_impossible_options(options, message) -> None:
    with pytest.raises(UsageError, match=message), attach(models.llava(), ACT(**{**OPTIONS, **options})):
        pass


def test_another_owner_of_a_head_is_refused() -> None:
    class Other:
        name = "other"

        def plan(self, adapter):
            return [EditStage(frozenset({2}), lambda view: None, heads=lambda layer: [1])]

    with pytest.raises(PlanConflict, match="act and other both edit"), attach(models.llava(), ACT(**OPTIONS), Other()):
        pass
