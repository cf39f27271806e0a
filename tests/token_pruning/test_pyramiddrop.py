"""PyramidDrop: stages ranked by the layer behind the cut, against decoder layers called by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "lmm"))
sys.path.insert(0, str(Path(__file__).parent))
import by_hand
import models
from by_hand import START
from running import FAMILIES, GENERATE, families, generate, mixed_batch, one_image

from vislm import FlowCut, attach
from vislm.errors import PlanConflict, UsageError
from vislm.token_pruning.pyramiddrop import PyramidDrop


def cuts(counts, layers, positions="contiguous"):
    """PyramidDrop's rule with full maps of the layer that follows."""
    state = {"alive": list(range(models.PATCHES))}

    def cut(number, point):
        if number + 1 not in layers:
            return None
        end = START + len(state["alive"])
        scores = point.following().mean(0)[-1, START:end].tolist()
        ranked = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
        kept = sorted(ranked[: counts[layers.index(number + 1)]])
        state["alive"] = [state["alive"][j] for j in kept]
        left = [*range(START), *(START + j for j in kept), *range(end, len(point.hidden))]
        return point.hidden[left], torch.arange(len(left)) if positions == "contiguous" else point.positions[left]

    return cut, state


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_prefill_equals_layers_called_by_hand(positions, kv_heads) -> None:
    model, inputs = models.llava(kv_heads=kv_heads), one_image("llava")
    cut, state = cuts((11, 6, 1), (1, 2, 4), positions)
    expected, columns = by_hand.prefill(model, inputs, cut)
    method = PyramidDrop(ratios=(0.7, 0.4, 0.1), layers=(1, 2, 4), positions=positions)
    logits, _, run = generate(model, inputs, method, max_new_tokens=1)
    torch.testing.assert_close(logits[0, 0], expected, atol=1e-4, rtol=0)
    assert run.layer_tokens == columns
    assert run.stages[-1].index == [state["alive"]]


def stages(depth, method=None):
    with attach(models.llava(layers=depth), method or PyramidDrop()) as session:
        return list(session.plan.language)


def test_published_layers_scale_with_the_depth() -> None:
    assert stages(32) == [8, 16, 24]
    assert stages(24) == [6, 12, 18]
    assert stages(5) == [1, 2, 4]
    assert stages(2) == [1]


def test_published_schedule_averages_270_tokens() -> None:
    counts = [576, *(int(r * 576) for r in PyramidDrop.ratios)]
    assert sum(counts) / 4 == 270


def test_a_model_with_fewer_stages_keeps_the_last_ratio() -> None:
    _, _, run = generate(models.llava(layers=2), one_image("llava"), PyramidDrop())
    assert run.layer_tokens == [22, 22 - 14]


@pytest.mark.parametrize("keep", [10, 0.6, 1.0])
def test_an_average_budget_is_met_up_to_rounding_down(keep) -> None:
    model, inputs = models.llava(layers=8), one_image("llava")
    _, _, run = generate(model, inputs, PyramidDrop(keep=keep), max_new_tokens=1)
    text = inputs["input_ids"].shape[1] - models.PATCHES
    mean = sum(n - text for n in run.layer_tokens) / 8
    wanted = keep if isinstance(keep, int) else keep * models.PATCHES
    assert wanted - 1 < mean <= wanted


@families
@pytest.mark.parametrize("method", [PyramidDrop(ratios=(1.0, 1.0, 1.0)), PyramidDrop(keep=1.0)], ids=str)
def test_keeping_everything_is_bit_identical(family, method) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    plain = model.generate(**inputs, **GENERATE)
    logits, _, run = generate(model, inputs, method)
    assert torch.equal(torch.stack(plain.logits), logits)
    assert run.stages == []


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_batch_equals_singles(positions) -> None:
    """Left padding; one image, two images, none."""
    model, method = models.llava(), PyramidDrop(positions=positions)
    batch, singles = mixed_batch()
    together, _, run = generate(model, batch, method)
    kept = []
    for row, inputs in enumerate(singles):
        alone, _, single = generate(model, inputs, method)
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=1e-4, rtol=0)
        kept += single.stages[-1].index if single.stages else []
    assert run.stages[-1].index == kept
    assert [len(image) for image in kept] == [2, 2, 2]


def test_behind_a_tower_that_prunes_the_ratios_are_of_what_it_left() -> None:
    model, inputs = models.llava(), one_image("llava")
    _, _, run = generate(model, inputs, FlowCut(keep=8, where="tower"), PyramidDrop())
    assert [n - 6 for n in run.layer_tokens] == [8, 4, 2, 2, 1]


@families
def test_beam_search_and_decoding_run(family) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    beams, _, _ = generate(model, inputs, PyramidDrop(), num_beams=3)
    greedy, out, run = generate(model, inputs, PyramidDrop())
    torch.testing.assert_close(beams[0, :1], greedy[0], atol=1e-4, rtol=0)
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == [n + 5 for n in run.layer_tokens]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_finite(dtype) -> None:
    logits, _, _ = generate(models.llava(dtype=dtype), one_image("llava", dtype=dtype), PyramidDrop(calibrate=True))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "options",
    [
        {"ratios": ()},
        {"ratios": (0.5, 0.6, 0.1)},
        {"ratios": (0.5, 0.25, 0.0)},
        {"ratios": (1.5, 0.25, 0.1)},
        {"ratios": (0.5, 0.25)},
        {"layers": (1, 2)},
        {"layers": (2, 1, 3)},
        {"keep": 3},
        {"keep": 0.2},
    ],
    ids=str,
)
def test_impossible_options(options) -> None:
    with pytest.raises(UsageError), attach(models.llava(), PyramidDrop(**options)):
        pass


def test_layers_outside_the_model_are_refused() -> None:
    with pytest.raises(PlanConflict), attach(models.llava(), PyramidDrop(layers=(1, 2, 5))):
        pass
    with pytest.raises(PlanConflict, match="the model has 1"), attach(models.llava(layers=1), PyramidDrop()):
        pass
