"""VisionZip: dominant and contextual tokens, and where they sit."""

from __future__ import annotations

import sys
from pathlib import Path

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
from vislm.token_pruning.visionzip import VisionZip, Zipped, contextual_tokens, zip_tokens


@pytest.mark.parametrize(
    ("path", "output"), towers.outputs("visionzip"), ids=lambda value: getattr(value, "stem", value)
)
def test_golden(path, output, tmp_path) -> None:
    assert towers.failures(path, tmp_path) == set()
    assert towers.failures(path, tmp_path, output) == {output.removeprefix("out.")}


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.data())
def test_every_other_token_joins_the_most_similar_target(total: int, data: st.DataObject) -> None:
    dominant = data.draw(st.integers(0, total - 1))
    contextual = data.draw(st.integers(1, total - dominant))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    attention, metric = torch.rand(total, generator=generator), torch.randn(total, 6, generator=generator)
    zipped = zip_tokens(attention, metric, dominant, contextual)
    assert zipped.dominant.tolist() == sorted(range(total), key=lambda i: -float(attention[i]))[:dominant]
    rest = [i for i in range(total) if i not in zipped.dominant.tolist()]
    step = max(1, len(rest) // contextual)
    targets = [rest[c * step] for c in range(contextual)]
    assert zipped.targets.tolist() == targets
    assert zipped.others.tolist() == [i for i in rest if i not in targets]
    unit = torch.nn.functional.normalize(metric, dim=-1)
    for token, owner in zip(zipped.others.tolist(), zipped.owner.tolist(), strict=True):
        similarity = [float(unit[token] @ unit[target]) for target in targets]
        assert similarity[owner] >= max(similarity) - 1e-6


def test_a_contextual_token_is_a_sum_of_target_and_mean() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 4.0], [2.0, 0.0]])
    zipped = Zipped(torch.tensor([]), torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([0, 0]))
    assert contextual_tokens(features, zipped).tolist() == [[4.0, 2.0], [0.0, 1.0]]


@pytest.mark.parametrize(("keep", "split"), [(64, 10), (128, 20), (192, 30), (32, 5), (2, 0), (1, 0)])
def test_published_splits(keep: int, split: int) -> None:
    assert VisionZip()._contextual(keep) == split
    assert VisionZip(contextual=7)._contextual(keep) == min(7, keep - 1)


def parts(model, inputs, keep: int, contextual: int, positions: str = "contiguous"):
    method = VisionZip(keep=keep, contextual=contextual, positions=positions)  # pyright: ignore[reportArgumentType]
    ((view, selection),) = towers.watched(model, inputs, method)
    tower = view.tower.features[0]
    local = zip_tokens(
        view.tower.signals["attention"][0, :, 0], view.tower.signals["metric"][0], keep - contextual - 1, contextual
    )
    with torch.no_grad():
        project = model.model.multi_modal_projector
        cls, context = project(tower[:1]), project(contextual_tokens(tower[1:], local))
    return view, selection, local, cls, context


def test_the_official_order_is_cls_dominant_contextual() -> None:
    view, selection, local, cls, context = parts(models.llava(), one_image("llava"), 8, 3)
    dominant = local.dominant.sort().values
    torch.testing.assert_close(selection.features[:1], cls)
    assert torch.equal(selection.features[1:5], view.features[dominant])  # the model's own tokens, to the bit
    torch.testing.assert_close(selection.features[5:], context)
    assert selection.keep.sum() == 8
    assert selection.keep[dominant].all()
    assert selection.keep[local.targets].all()
    assert selection.size.tolist() == [1.0] * 5 + [1.0 + float((local.owner == c).sum()) for c in range(3)]
    assert selection.size.sum() == 16 + 1
    assert selection.source[dominant].tolist() == [1, 2, 3, 4]
    assert selection.source[local.targets].tolist() == [5, 6, 7]
    assert selection.source[local.others].tolist() == (local.owner + 5).tolist()


def test_with_original_positions_contextual_tokens_sit_in_their_targets_seats() -> None:
    view, selection, local, cls, context = parts(models.llava(), one_image("llava"), 8, 3, "original")
    order = torch.cat([local.dominant, local.targets]).sort().values.tolist()
    torch.testing.assert_close(selection.features[:1], cls)
    for place, token in enumerate(order, start=1):
        expected = view.features[token]
        if token in local.targets.tolist():
            expected = context[local.targets.tolist().index(token)]
        torch.testing.assert_close(selection.features[place], expected)
    first_free = min(set(range(16)) - set(order))
    assert selection.keep.nonzero().flatten().tolist() == sorted([*order, first_free])


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_keeping_all_changes_nothing(family: str) -> None:
    model, inputs = getattr(models, family)(), one_image(family)
    plain, _, _ = generate(model, inputs)
    for keep in (1.0, 10_000):
        assert torch.equal(generate(model, inputs, VisionZip(keep=keep))[0], plain)


def test_tiles_come_as_dominant_then_cls_then_contextual_behind_the_base_view() -> None:
    model, inputs = models.llava_next(), one_image("llava_next")
    ((view, selection),) = towers.watched(model, inputs, VisionZip(crop_keep=5, contextual=2))
    assert selection.keep.sum() == 25
    assert selection.size.sum() == int(view.candidates.sum()) + 5
    assert not selection.keep[~view.candidates].any()
    assert (selection.source[~view.candidates] == -1).all()
    project, heads = model.model.multi_modal_projector, view.tower.features[:, :1]
    with torch.no_grad():
        torch.testing.assert_close(selection.features[:1], project(heads[0]))
        torch.testing.assert_close(selection.features[5 + 8 : 5 + 8 + 4], project(heads[1:, 0]))
    base, tiles = selection.source[:16], selection.source[16:]
    assert set(base.tolist()) == {1, 2, 3, 4}
    raster = [int((tiles == place).nonzero()) for place in range(5, 13)]
    assert raster == sorted(raster)
    for place, token in zip(range(5, 13), raster, strict=True):
        assert torch.equal(selection.features[place], view.features[16 + token])
    assert set(tiles[tiles >= 13].tolist()) == set(range(17, 25))


def test_a_budget_of_the_image_is_shared_and_whole_crops_stay_as_they_are() -> None:
    model, inputs = models.llava_next(), one_image("llava_next")
    ((view, selection),) = towers.watched(model, inputs, VisionZip(keep=62, contextual=2))
    assert selection.keep.sum() == 62
    tiles = [t for t in view.candidates.nonzero().flatten().tolist() if t >= 16]  # four of 12 tokens, under their share
    assert len(tiles) == 48
    for token in tiles:
        assert torch.equal(selection.features[selection.source[token]], view.features[token])
    assert selection.keep[:16].sum() == 14


def test_a_batch_gives_what_its_samples_give() -> None:
    model = models.llava()
    batch, singles = mixed_batch()
    for positions in ("original", "contiguous"):
        method = VisionZip(keep=6, contextual=2, positions=positions)  # pyright: ignore[reportArgumentType]
        together, _, _ = generate(model, batch, method)
        for row, single in enumerate(singles):
            alone, _, _ = generate(model, single, method)
            torch.testing.assert_close(together[:, row], alone[:, 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [models.llava, towers.siglip])
def test_low_precision(build, dtype) -> None:
    logits, _, run = generate(build(dtype=dtype), one_image("llava", dtype=dtype), VisionZip(keep=8))
    assert not logits.isnan().any()
    assert run.visual_tokens_kept == [8]


def test_without_cls_all_dominant_tokens_are_patches_ranked_by_received_attention() -> None:
    model, inputs = towers.siglip(), one_image("llava")
    ((view, selection),) = towers.watched(model, inputs, VisionZip(keep=6, contextual=2))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-1]
    best = maps[0].mean(0).mean(0).topk(4).indices.sort().values
    assert torch.equal(selection.features[:4], view.features[best])
    assert selection.size.sum() == 16


def test_joined_patches_are_zipped_as_projected_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 16, 1, generator=generator)
    metric, features = torch.randn(2, 16, 4, generator=generator), torch.randn(16, 6, generator=generator)
    view = towers.joined_view({"attention": attention, "metric": metric}, features.bfloat16())
    chosen = VisionZip(crop_keep=4, contextual=1)._select(1, view)  # crops lie one behind the other
    for crop in range(2):
        own = slice(8 * crop, 8 * crop + 8)
        cells = view.features[own].float()
        local = zip_tokens(attention[crop].view(8, 2).mean(1), metric[crop].view(8, 2, 4).mean(1), 3, 1)
        expected = torch.cat([cells[local.dominant.sort().values], contextual_tokens(cells, local)])
        assert torch.equal(chosen.features[4 * crop : 4 * crop + 4], expected.bfloat16())


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_every_family_keeps_the_budget(family: str, positions) -> None:
    model, picture = families.build(family), families.FAMILIES[family].picture(2, 0)
    inputs = families.inputs(family, ([picture], [7, 9]))
    logits, _, after = generate(model, inputs, VisionZip(keep=5, contextual=1, positions=positions), max_new_tokens=2)
    assert after.visual_tokens_kept == [5]
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"keep": 1.5},
        {"keep": 8, "contextual": 8},
        {"keep": 8, "contextual": -1},
        {"crop_keep": 4, "contextual": 4},
        {"crop_keep": 0},
    ],
)
def test_impossible_options(options) -> None:
    with pytest.raises(UsageError), attach(models.llava(), VisionZip(**options)):
        pass
