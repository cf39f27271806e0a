"""PAINT's groups of tokens, and the session against explicit matrices."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from eager import Prompt, check_against_eager, plain
from hypothesis import given
from hypothesis import strategies as st
from running import FAMILIES, families, generate, mixed_batch, one_image

from vislm import FastV, FlowCut, attach
from vislm.errors import PlanConflict, UsageError
from vislm.heads.imbalanced import Imbalanced, boost, outlier_ratio, select_tokens


@given(st.lists(st.floats(0.0, 1.0, width=32), min_size=2, max_size=40))
def test_outliers_are_those_of_numpys_quartiles(values: list[float]) -> None:
    array = np.array(values, dtype=np.float64)
    low, high = np.percentile(array, [25, 75])
    expected = (array > high + 1.5 * (high - low)).mean()
    assert outlier_ratio(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected)


def test_summary_tokens_leave_the_local_ones() -> None:
    first = torch.arange(12.0)
    penultimate = torch.tensor([1.0, 2, 1, 2, 1, 2, 1, 2, 1, 30, 1, 20])
    local, summary = select_tokens(first, penultimate, 0.25)
    assert summary.tolist() == [9, 11]
    assert local.tolist() == [10]
    assert select_tokens(first, torch.ones(12), 0.0)[0].tolist() == []


def test_negative_logits_move_towards_zero() -> None:
    assert boost(torch.tensor([-2.0, 2.0]), torch.tensor(0.5)).tolist() == [-1.0, 3.0]


def cls_rows(model, pixels) -> list[torch.Tensor]:
    """CLS rows (N,), summed over heads, of the tower's first layer and last but one, by eager attention."""
    model.set_attn_implementation({"vision_config": "eager"})
    with torch.no_grad():
        maps = model.model.vision_tower(pixels, output_attentions=True).attentions
    model.set_attn_implementation({"vision_config": "sdpa"})
    return [maps[layer][0, :, 0, 1:].sum(0) for layer in (0, -2)]


@pytest.mark.parametrize("gain", [None, (0.0, 1.0, 2.0, 0.5)])
def test_session_equals_explicit_matrices(gain) -> None:
    model, inputs = models.llava(), one_image("llava")
    first, penultimate = cls_rows(model, inputs["pixel_values"])
    local, summary = select_tokens(first, penultimate, 0.4)
    assert len(local)
    assert len(summary)
    strength = torch.zeros(models.PATCHES)
    strength[local], strength[summary] = 0.9, 0.3

    def edit(logits, mask, layer):
        weights = plain(logits, mask, layer)
        if layer in (1, 2, 4):
            for row in range(Prompt.length - 1, logits.shape[2]):
                for head in range(4):
                    s = logits[0, head, row] + mask[0, 0, row]
                    own = slice(Prompt.start, Prompt.end)
                    s[own] += (1.0 if gain is None else gain[head]) * strength * s[own].abs()
                    weights[0, head, row] = s.softmax(-1)
        return weights

    method = Imbalanced(alpha=0.9, local_token_ratio=0.4, layers=(1, 2, 4), head_gain=gain)
    check_against_eager(method, edit, model=model)


@families
def test_the_chosen_tokens_are_patches_of_their_image(family: str) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    plain_logits, _, _ = generate(model, inputs)
    logits, _, run = generate(model, inputs, Imbalanced(local_token_ratio=0.5))
    memory = run.memory[0]
    patches = {"llava": 16, "llava_next": 16 + 8 * 6}[family]
    assert len(memory["local"][0]) + len(set(memory["summary"][0].tolist())) >= patches // 2
    if family == "llava_next":
        newlines = {16 + 7 * row + 6 for row in range(8)}
        assert not newlines & {*memory["local"][0].tolist(), *memory["summary"][0].tolist()}
    assert (logits - plain_logits).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"alpha": 0.0, "beta": 0.0}, {"head_gain": (0.0,) * 4}, {"layers": ()}])
def test_neutral_settings_return_no_stages(options) -> None:
    model, inputs = models.llava(), one_image("llava")
    with attach(model, Imbalanced(**options)) as session:
        assert not session.plan.edits
        assert not session.plan.prompt
    assert torch.equal(generate(model, inputs)[0], generate(model, inputs, Imbalanced(**options))[0])


def test_a_batch_gives_what_its_samples_give_alone() -> None:
    model, (batch, singles) = models.llava(), mixed_batch()
    together, _, _ = generate(model, batch, Imbalanced())
    without, _, _ = generate(model, batch)
    for row, single in enumerate(singles):
        alone, _, _ = generate(model, single, *([Imbalanced()] if "pixel_values" in single else []))
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=2e-4, rtol=1e-4)
    assert torch.equal(together[:, 2], without[:, 2])  # no image
    assert (together[:, :2] - without[:, :2]).abs().max() > 1e-3


def test_beams_and_static_caches() -> None:
    model, inputs, method = models.llava(), one_image("llava"), Imbalanced()
    dynamic, _, _ = generate(model, inputs, method)
    static, _, _ = generate(model, inputs, method, cache_implementation="static")
    torch.testing.assert_close(static, dynamic, atol=1e-4, rtol=1e-4)
    beams, _, _ = generate(model, inputs, method, num_beams=3, max_new_tokens=1)
    torch.testing.assert_close(beams[0], dynamic[0].expand(3, -1), atol=1e-4, rtol=1e-4)
    assert generate(model, inputs, method, num_beams=3)[1].sequences.shape[0] == 1


def test_half_precision() -> None:
    model = models.llava(dtype=torch.bfloat16)
    logits, _, _ = generate(model, one_image("llava", dtype=torch.bfloat16), Imbalanced())
    assert logits.isfinite().all()


@pytest.mark.parametrize("pruner", [FlowCut(keep=8), FastV(keep=8)])
def test_pruners_take_its_tokens_away(pruner) -> None:
    with pytest.raises(PlanConflict, match=f"imbalanced speaks of single image tokens, which {pruner.name}"):
        with attach(models.llava(), pruner, Imbalanced()):
            pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"beta": float("inf")}, "beta=inf"),
        ({"local_token_ratio": 1.1}, "local_token_ratio=1.1"),
        ({"head_gain": (1.0, 2.0)}, "head_gain has 2 factors; the model has 4 heads"),
    ],
)
def test_impossible_options(options, message) -> None:
    with pytest.raises(UsageError, match=message), attach(models.llava(), Imbalanced(**options)):
        pass
