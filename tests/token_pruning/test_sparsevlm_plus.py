"""SparseVLM+: the rotary correction and the choice of heads, against decoder layers called by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "lmm"))
sys.path.insert(0, str(Path(__file__).parent))
import by_hand
import models
from by_hand import START, raters_of
from running import FAMILIES, GENERATE, families, generate, mixed_batch, one_image

from vislm import attach
from vislm.errors import UsageError
from vislm.token_pruning.sparsevlm_plus import SparseVLMPlus, relevance, rotated_ones

WORDS = (7, 8, 9, 20, 31, 44, 2)


def cuts(counts, layers, raters, heads, dim, contiguous=False):
    """SparseVLM+'s rule with plain loops and full maps; queries and keys of ones are rotated one by one."""
    state = {"alive": list(range(models.PATCHES))}
    frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)

    def cut(number, point):
        if number not in layers:
            return None
        place = torch.arange(len(point.hidden)) if contiguous else point.positions
        angle = (place[:, None] - place[None])[..., None] * frequency
        bare = by_hand.causal_softmax(2 * angle.cos().sum(-1) / dim**0.5)  # a rotated pair (1, 1) has length sqrt 2
        corrected = point.attention / bare
        end = START + len(state["alive"])
        rows = corrected[:, [end + i for i in raters], START:end]
        sums = [float(rows[h].sum()) for h in range(len(rows))]
        chosen = sorted(range(len(sums)), key=lambda h: (-sums[h], h))[:heads]
        scores = rows[chosen].mean((0, 1)).tolist()
        ranked = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
        kept = sorted(ranked[: counts[layers.index(number)]])
        state["alive"] = [state["alive"][j] for j in kept]
        left = [*range(START), *(START + j for j in kept), *range(end, len(place))]
        return point.hidden[left], torch.arange(len(left)) if contiguous else point.positions[left]

    return cut, state


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_prefill_equals_layers_called_by_hand(positions, kv_heads) -> None:
    model, inputs = models.llava(kv_heads=kv_heads), one_image("llava", words=WORDS)
    counts, layers = (10, 5, 3), (0, 1, 3)
    with torch.no_grad():
        cut, state = cuts(counts, layers, raters_of(model, inputs), 2, 8, positions == "contiguous")
    expected, columns = by_hand.prefill(model, inputs, cut)
    method = SparseVLMPlus(counts=counts, layers=layers, heads=2, positions=positions)
    logits, _, run = generate(model, inputs, method, max_new_tokens=1)
    torch.testing.assert_close(logits[0, 0], expected, atol=1e-4, rtol=0)
    assert run.layer_tokens == columns
    assert run.stages[-1].index == [state["alive"]]


def test_the_correction_and_the_heads_matter() -> None:
    model, inputs = models.llava(), one_image("llava", words=WORDS)
    kept = set()
    for options in ({}, {"correct_rotary": False}, {"heads": 1}):
        method = SparseVLMPlus(counts=(8,), layers=(0,), **{"heads": 4, **options})
        kept.add(tuple(generate(model, inputs, method, max_new_tokens=1)[2].stages[-1].index[0]))
    assert len(kept) == 3


def test_ones_are_rotated_as_the_model_rotates() -> None:
    model = models.llava()
    positions = torch.arange(5)[None]
    cos, sin = model.model.language_model.rotary_emb(torch.zeros(1, 5, 32), position_ids=positions)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    ones = torch.ones(1, 1, 5, 8)
    torch.testing.assert_close(rotated_ones(cos, sin), apply_rotary_pos_emb(ones, ones, cos, sin)[0])


def test_heads_with_the_largest_sums_are_averaged() -> None:
    received = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0], [0.5, 0.5]])
    torch.testing.assert_close(relevance(received, 2, 5), torch.tensor([1.0, 2.5]) / 5)
    torch.testing.assert_close(relevance(received, 0.5, 1), relevance(received, 2, 1))
    torch.testing.assert_close(relevance(received, 14, 1), received.mean(0))


@families
def test_keeping_everything_is_bit_identical(family) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    plain = model.generate(**inputs, **GENERATE)
    logits, _, run = generate(model, inputs, SparseVLMPlus(keep=1.0))
    assert torch.equal(torch.stack(plain.logits), logits)
    assert run.stages == []


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_batch_equals_singles(positions) -> None:
    """Left padding; one image, two images, none."""
    model, method = models.llava(), SparseVLMPlus(counts=(9, 5, 2), heads=2, positions=positions)
    batch, singles = mixed_batch()
    together, _, run = generate(model, batch, method)
    kept = []
    for row, inputs in enumerate(singles):
        alone, _, single = generate(model, inputs, method)
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=1e-4, rtol=0)
        kept += single.stages[-1].index if single.stages else []
    assert run.stages[-1].index == kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_finite(dtype) -> None:
    method = SparseVLMPlus(keep=4, calibrate=True)
    logits, _, _ = generate(models.llava(dtype=dtype), one_image("llava", dtype=dtype), method)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("options", [{"heads": 0}, {"heads": 1.5}, {"keep": 0}, {"counts": (0, 1, 1)}], ids=str)
def test_impossible_options(options) -> None:
    with pytest.raises(UsageError), attach(models.llava(), SparseVLMPlus(**{"keep": 4, **options})):
        pass
