"""PruMerge and PruMerge+: adaptive ratio, merging by keys, the extra token."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import families
import models
import towers
from running import generate, mixed_batch, one_image

from vislm import attach
from vislm.errors import UsageError
from vislm.lmm.decoder.attention import AttentionCall
from vislm.token_pruning.prumerge import (
    PruMerge,
    kept_number,
    kept_tokens,
    merge,
    outlier_ratio,
    wide_attention,
    wide_keys,
)


@pytest.mark.parametrize(
    ("path", "output"), towers.outputs("prumerge"), ids=lambda value: getattr(value, "stem", value)
)
def test_golden(path, output, tmp_path) -> None:
    assert towers.failures(path, tmp_path) == set()
    assert towers.failures(path, tmp_path, output) == {output.removeprefix("out.")}


def test_attention_of_one_wide_head() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 7, 4, generator=generator), torch.randn(2, 3, 7, 4, generator=generator)
    call = AttentionCall(query, key, key, None, False, 0.5)
    q, k = (x.permute(0, 2, 1, 3).reshape(2, 7, 12) for x in (query, key))
    matrix = (q @ k.transpose(1, 2) / 12**0.5).softmax(-1)
    torch.testing.assert_close(wide_attention(call, 1)[..., 0], matrix[:, 0, 1:])
    torch.testing.assert_close(wide_attention(call, 0)[..., 0], matrix.mean(1))
    assert torch.equal(wide_keys(call, 1), k[:, 1:])


@given(st.integers(1, 200), st.integers(0, 99))
def test_outliers_lie_above_the_interquartile_fence(total: int, seed: int) -> None:
    values = torch.randn(total, generator=torch.Generator().manual_seed(seed)).exp()
    low, high = np.percentile(values.double().numpy(), [25, 75])
    expected = float((values.double().numpy() > high + 1.5 * (high - low)).mean())
    assert outlier_ratio(values) == expected


def test_uniform_attention_has_no_outliers_and_keeps_one_token() -> None:
    attention = torch.full((64,), 1 / 64)
    assert outlier_ratio(attention) == 0.0
    assert kept_tokens(attention, 0.0).tolist() == [0]
    assert kept_tokens(attention, 0.0, plus=True).tolist() == [0, 21, 42]  # steps of int(64 / 3)


def test_plus_adds_regular_positions_that_are_not_kept_yet() -> None:
    attention = torch.zeros(576)
    attention[[5, 18, 100]] = torch.tensor([0.1, 0.3, 0.2])
    kept = kept_tokens(attention, 3 / 576, plus=True)
    assert kept[:3].tolist() == [18, 100, 5]
    assert kept[3:].tolist() == list(range(0, 575, 64))
    dense = kept_tokens(torch.rand(576, generator=torch.Generator().manual_seed(0)), 0.4, plus=True)
    assert sorted(dense.tolist())[:575] == list(range(575))  # a step of one; the last is left to attention


@given(st.integers(1, 60), st.data())
def test_a_given_number_is_met_exactly(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    attention = torch.rand(total, generator=torch.Generator().manual_seed(count))
    for plus in (False, True):
        kept = kept_number(attention, count, plus)
        assert len(set(kept.tolist())) == len(kept) == count


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 20, 33, 34, 60]), st.data())
def test_merging_by_hand(total: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    attention, keys = torch.rand(total, generator=generator), torch.randn(total, 5, generator=generator)
    features = torch.randn(total, 3, generator=generator)
    kept = torch.randperm(total, generator=generator)[: data.draw(st.integers(1, total))]
    unit = torch.nn.functional.normalize(keys, dim=-1)
    rows = []
    for i in kept.tolist():
        others = sorted((j for j in range(total) if j != i), key=lambda j, i=i: -float(unit[i] @ unit[j]))
        rows.append(features[i] + sum((attention[j] * features[j] for j in others[:32]), torch.zeros(3)))
    dropped = [j for j in range(total) if j not in kept.tolist()]
    rows.append(sum((attention[j] * features[j] for j in dropped), torch.zeros(3)))
    torch.testing.assert_close(merge(attention, keys, features, kept), torch.stack(rows), atol=1e-5, rtol=1e-5)


def test_equal_keys_prefer_kept_tokens_and_then_lower_indices() -> None:
    total, kept = 40, torch.tensor([39, 7])
    attention, features = torch.ones(total), torch.eye(total)
    merged = merge(attention, torch.ones(total, 2), features, kept)
    absorbed = set(merged[0].nonzero().flatten().tolist()) - {39}
    assert absorbed == {7, *[j for j in range(32) if j != 7]}


def run(model, inputs, **options):
    ((view, selection),) = towers.watched(model, inputs, PruMerge(**options))
    return view, selection


def test_kept_tokens_come_in_raster_order_and_the_extra_token_last() -> None:
    model, inputs = models.llava(), one_image("llava")
    view, selection = run(model, inputs, keep=6)
    attention, keys = view.tower.signals["attention"][0, :, 0], view.tower.signals["keys"][0]
    kept = attention.topk(5).indices.sort().values
    with torch.no_grad():
        made = model.model.multi_modal_projector(merge(attention, keys, view.tower.features[0, 1:], kept))
    torch.testing.assert_close(selection.features, made)
    assert selection.source[kept].tolist() == [0, 1, 2, 3, 4]
    assert (selection.source == 5).sum() == 11
    assert selection.size.tolist() == [1.0] * 5 + [11.0]
    last = max(set(range(16)) - set(kept.tolist()))
    assert selection.keep.nonzero().flatten().tolist() == sorted([*kept.tolist(), last])
    _, official = run(model, inputs, reduction_ratio=5 / 16, attention_order=True)
    falling = attention.topk(5).indices
    torch.testing.assert_close(official.features[:-1], made[[kept.tolist().index(i) for i in falling.tolist()]])


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("keep", [1, 2, 5, 15, 0.25])
def test_budgets_include_the_extra_token(keep, plus) -> None:
    for family in ("llava", "llava_next"):
        _, selection = run(getattr(models, family)(), one_image(family), keep=keep, plus=plus)
        total = 16 if family == "llava" else 64
        assert selection.keep.sum() == (round(keep * total) if isinstance(keep, float) else keep)
        assert torch.isfinite(selection.features).all()


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_keeping_all_changes_nothing(family: str) -> None:
    model, inputs = getattr(models, family)(), one_image(family)
    plain, _, _ = generate(model, inputs)
    for options in ({"keep": 1.0}, {"keep": 10_000}, {"reduction_ratio": 1.0}):
        assert torch.equal(generate(model, inputs, PruMerge(**options))[0], plain)


def test_every_tile_has_its_own_tokens_and_extra_one() -> None:
    view, selection = run(models.llava_next(), one_image("llava_next"), reduction_ratio=0.25)
    assert selection.keep.sum() == (4 + 1) + 4 * (3 + 1)
    assert not selection.keep[~view.candidates].any()
    assert selection.size.sum() == view.candidates.sum()


@pytest.mark.parametrize("options", [{}, {"plus": True, "keep": 6}, {"reduction_ratio": 0.25, "positions": "original"}])
def test_a_batch_gives_what_its_samples_give(options) -> None:
    model = models.llava()
    batch, singles = mixed_batch()
    together, _, _ = generate(model, batch, PruMerge(**options))
    for row, single in enumerate(singles):
        alone, _, _ = generate(model, single, PruMerge(**options))
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=5e-5, rtol=1e-4)


def test_a_shared_ratio_gives_all_images_of_a_call_the_same_number() -> None:
    model = models.llava()
    pixels = torch.cat([models.pixels(1, 3), models.pixels(1, 5)])  # one outlier, and four
    inputs = {"input_ids": models.prompt(7, images=2), "pixel_values": pixels}
    counts = {}
    for shared in (False, True):
        seen = towers.watched(model, inputs, PruMerge(shared_ratio=shared))
        counts[shared] = [int(selection.keep.sum()) for _, selection in seen]
        attention = torch.cat([view.tower.signals["attention"].flatten() for view, _ in seen])
    assert counts[True][0] == counts[True][1] == max(1, int(16 * outlier_ratio(attention))) + 1
    assert counts[False] == [2, 5]
    assert counts[True][0] not in counts[False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [models.llava, towers.siglip])
@pytest.mark.parametrize("plus", [False, True])
def test_low_precision_and_towers_without_cls(build, dtype, plus) -> None:
    logits, _, after = generate(build(dtype=dtype), one_image("llava", dtype=dtype), PruMerge(keep=6, plus=plus))
    assert not logits.isnan().any()
    assert after.visual_tokens_kept == [6]


def test_joined_patches_are_reduced_as_projected_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    attention, keys = torch.rand(1, 16, 1, generator=generator), torch.randn(1, 16, 4, generator=generator)
    features = torch.randn(8, 6, generator=generator)
    view = towers.joined_view({"attention": attention, "keys": keys}, features)
    chosen = PruMerge(keep=4, attention_order=True)._select(0, view)
    cells = attention.view(8, 2).sum(1)
    expected = merge(cells, keys[0].view(8, 2, 4).mean(1), features, cells.topk(3).indices)
    torch.testing.assert_close(chosen.features, expected)


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_every_family_keeps_the_budget(family: str, positions) -> None:
    model, picture = families.build(family), families.FAMILIES[family].picture(2, 0)
    inputs = families.inputs(family, ([picture], [7, 9]))
    logits, _, after = generate(model, inputs, PruMerge(keep=5, plus=True, positions=positions), max_new_tokens=2)
    assert after.visual_tokens_kept == [5]
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"keep": 1.5},
        {"keep": 8, "reduction_ratio": 0.5},
        {"keep": 8, "shared_ratio": True},
        {"reduction_ratio": 0.0},
        {"reduction_ratio": 1.5},
        {"attention_order": True, "positions": "original"},
    ],
)
def test_impossible_options(options) -> None:
    with pytest.raises(UsageError), attach(models.llava(), PruMerge(**options)):
        pass
