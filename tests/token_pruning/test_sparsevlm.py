"""SparseVLM: raters, stages, recycling, against decoder layers called by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "lmm"))
sys.path.insert(0, str(Path(__file__).parent))
import by_hand
import models
from by_hand import START, peaks, raters_of
from running import FAMILIES, GENERATE, families, generate, mixed_batch, one_image

from vislm import attach
from vislm.errors import PlanConflict, UsageError
from vislm.lmm.choosing.text_relevance import choose_raters, rater_scores
from vislm.token_pruning.sparsevlm import SparseVLM, recycle, recycle_candidates


def cuts(counts, layers, positions="contiguous", share=0.3, per_cluster=10):
    """SparseVLM's rule, written with plain loops and full maps; one image of 16 tokens in front of the text."""
    state = {"alive": models.PATCHES, "raters": None}

    def cut(number, point):
        if number not in layers:
            return None
        alive, hidden = state["alive"], point.hidden
        end = START + alive
        raters = [end + i for i in state["raters"]]
        scores = [
            float(sum(point.attention[h, i, j] for h in range(len(point.attention)) for i in raters))
            for j in range(START, end)
        ]
        ranked = sorted(range(alive), key=lambda j: (-scores[j], j))
        count = counts[layers.index(number)]
        kept, dropped = sorted(ranked[:count]), ranked[count:]
        recycled = dropped[: int(share * len(dropped)) + 1]
        means, centers = peaks(hidden[START:end][recycled], min(len(recycled), int(len(recycled) / per_cluster) + 1))
        rows = [hidden[:START], hidden[START:end][kept], means, hidden[end:]]
        state["alive"] = len(kept) + len(means)
        if positions == "contiguous":
            hidden = torch.cat(rows)
            return hidden, torch.arange(len(hidden))
        seats = [*kept, *(recycled[c] for c in centers)]
        order = sorted(range(len(seats)), key=seats.__getitem__)
        hidden = torch.cat([rows[0], torch.cat(rows[1:3])[order], rows[3]])
        left = [*range(START), *(START + seats[o] for o in order), *range(end, len(point.positions))]
        return hidden, point.positions[left]

    return cut, state


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_prefill_equals_layers_called_by_hand(positions, kv_heads) -> None:
    model, inputs = models.llava(kv_heads=kv_heads), one_image("llava", words=(7, 8, 9, 20, 31, 44, 2))
    method = SparseVLM(counts=(10, 5, 3), layers=(0, 1, 3), positions=positions, recycle=0.5, per_cluster=2)
    cut, state = cuts((10, 5, 3), (0, 1, 3), positions, 0.5, 2)
    with torch.no_grad():
        state["raters"] = raters_of(model, inputs)
    expected, columns = by_hand.prefill(model, inputs, cut)
    logits, _, run = generate(model, inputs, method, max_new_tokens=1)
    torch.testing.assert_close(logits[0, 0], expected, atol=1e-4, rtol=0)
    assert run.layer_tokens == columns
    assert columns[-1] < columns[2] < columns[1] < columns[0]


NEUTRAL = [SparseVLM(keep=1.0), SparseVLM(keep=16, recycle=0.0), SparseVLM(keep=16, counts=(99, 99, 99))]


@pytest.mark.parametrize("method", NEUTRAL)
@families
def test_keeping_everything_is_bit_identical(family, method) -> None:
    if family == "llava_next" and method.keep == 16:
        method = replace(method, keep=1000)
    model, inputs = FAMILIES[family](), one_image(family)
    plain = model.generate(**inputs, **GENERATE)
    logits, _, run = generate(model, inputs, method)
    assert torch.equal(torch.stack(plain.logits), logits)
    assert run.stages == []


@pytest.mark.parametrize("options", [{}, {"recycle": 0.0}, {"positions": "original"}, {"per_cluster": 1}], ids=str)
def test_batch_equals_singles(options) -> None:
    """Left padding; one image, two images, none."""
    model, method = models.llava(), SparseVLM(counts=(9, 5, 2), **options)
    batch, singles = mixed_batch()
    together, _, run = generate(model, batch, method)
    kept = []
    for row, inputs in enumerate(singles):
        alone, _, single = generate(model, inputs, method)
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=1e-4, rtol=0)
        kept += single.stages[-1].index if single.stages else []
    assert run.stages[-1].index == kept


@families
def test_beam_search_and_decoding_run(family) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    beams, _, _ = generate(model, inputs, SparseVLM(keep=4), num_beams=3)
    greedy, out, run = generate(model, inputs, SparseVLM(keep=4))
    torch.testing.assert_close(beams[0, :1], greedy[0], atol=1e-4, rtol=0)
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == [n + 5 for n in run.layer_tokens]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_finite(dtype) -> None:
    logits, _, _ = generate(models.llava(dtype=dtype), one_image("llava", dtype=dtype), SparseVLM(keep=4))
    assert torch.isfinite(logits).all()


def test_an_image_without_text_behind_it_is_left_alone() -> None:
    model, inputs = models.llava(), {"input_ids": models.prompt(), "pixel_values": models.pixels()}
    plain = model.generate(**inputs, **GENERATE)
    assert torch.equal(generate(model, inputs, SparseVLM(keep=2))[0], torch.stack(plain.logits))


def test_each_image_has_its_own_raters() -> None:
    """Text between two images rates the first one only."""
    ids = torch.cat([models.prompt(7, 8), torch.tensor([[*[models.IMAGE_TOKEN] * models.PATCHES, 9, 10, 11]])], 1)
    model = models.llava()
    with torch.no_grad(), attach(model, SparseVLM(keep=4)) as session:
        model(input_ids=ids, pixel_values=models.pixels(2))
        raters = session.last_run.memory[0]["raters"]
    first, second = raters[0, 0].tolist(), raters[0, 1].tolist()
    assert set(first) < {19, 20, 37, 38, 39}
    assert set(second) < {37, 38, 39}


def test_equal_words_are_all_raters() -> None:
    assert choose_raters(torch.tensor([1.0])).tolist() == [0]
    assert choose_raters(torch.full((4,), 0.25)).tolist() == [0, 1, 2, 3]
    visual, text = torch.eye(3), torch.eye(3)[:2] * 5
    torch.testing.assert_close(rater_scores(visual, text).sum(), torch.tensor(1.0))


def test_recycled_tokens_come_on_top_as_published() -> None:
    """Nine, four and three in the budget of 192 tokens."""
    alive, counts = 576, []
    for kept in (300, 200, 110):
        scores = torch.rand(alive, generator=torch.Generator().manual_seed(kept))
        keep = torch.zeros(alive, dtype=torch.bool)
        keep[scores.topk(kept).indices] = True
        candidates = recycle_candidates(scores, keep, 0.3)
        assert not keep[candidates].any()
        counts.append(len(recycle(torch.randn(len(candidates), 8)).tokens))
        alive = kept + counts[-1]
    assert counts == [9, 4, 3]


def test_sizes_count_every_token_once() -> None:
    """Kept tokens and what was recycled into clusters; the rest is gone."""
    model, inputs = models.llava(), one_image("llava")
    method = SparseVLM(counts=(6, 4, 3), recycle=1.0, per_cluster=2)
    with torch.no_grad(), attach(model, method) as session:
        model(**inputs)
        segment = session._decoder.segments[-1]
    assert float(segment.size[segment.image_of >= 0].sum()) == models.PATCHES
    assert bool((segment.size[segment.image_of < 0] == 1).all())


def test_drop_one_drops_at_least_one() -> None:
    model, inputs = models.llava(), one_image("llava")
    full = inputs["input_ids"].shape[1]
    _, _, run = generate(model, inputs, SparseVLM(counts=(16, 16, 16), drop_one=True, recycle=0.0))
    assert run.layer_tokens == [full, full - 1, full - 2, full - 3, full - 3]


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"recycle": 1.5},
        {"per_cluster": 0},
        {"counts": (5, 0, 1)},
        {"counts": ()},
        {"counts": (4, 2)},
        {"layers": (1, 2)},
        {"layers": (2, 1, 3)},
    ],
    ids=str,
)
def test_impossible_options(options) -> None:
    with pytest.raises(UsageError), attach(models.llava(), SparseVLM(**{"keep": 4, **options})):
        pass


def test_layers_outside_the_model_are_refused() -> None:
    with pytest.raises(PlanConflict), attach(models.llava(), SparseVLM(keep=4, layers=(1, 2, 4))):
        pass
    with pytest.raises(PlanConflict, match="the model has 1"), attach(models.llava(layers=1), SparseVLM(keep=4)):
        pass
