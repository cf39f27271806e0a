"""VisPruner: attention decides one share of the budget, diversity the other."""

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
from vislm.token_pruning.vispruner import VisPruner, choose, diverse


@pytest.mark.parametrize(
    ("path", "output"), towers.outputs("vispruner"), ids=lambda value: getattr(value, "stem", value)
)
def test_golden(path, output, tmp_path) -> None:
    assert towers.failures(path, tmp_path) == set()
    assert towers.failures(path, tmp_path, output) == {output.removeprefix("out.")}


def by_hand(features: torch.Tensor, order: list[int], count: int) -> list[int]:
    """The rule with plain lists, one pair at a time."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    left = list(order)
    while count and len(left) > count:
        even, odd = left[::2], left[1::2]
        best = {i: max(float(unit[i] @ unit[j]) for j in odd) for i in even}
        closest = sorted(even, key=lambda i: -best[i])
        left = closest[min(8, len(left) - count) :] + odd
    return left if count else []


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 41), st.data())
def test_diverse_tokens_of_lists_of_any_length(total: int, data: st.DataObject) -> None:
    count, seed = data.draw(st.integers(0, total)), data.draw(st.integers(0, 99))
    features = torch.randn(total, 12, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed + 1))
    chosen = diverse(features, order, count)
    assert len(chosen) == count
    assert chosen.tolist() == by_hand(features, order.tolist(), count)


def test_duplicates_go_first_and_the_most_attended_stay() -> None:
    features = torch.eye(12)
    features[1::2] = features[::2]  # six pairs of twins
    attention = torch.linspace(1, 0, 12)
    kept = choose(attention, features, 6, 0.0)
    assert kept.view(6, 2).sum(1).tolist() == [1] * 6
    assert choose(attention, features, 5, 1.0).tolist() == [True] * 5 + [False] * 7
    assert choose(attention, features, 7, 0.75)[:5].all()  # int(7 · 0.75) = 5 by attention


def test_equal_attention_prefers_the_lower_index() -> None:
    assert choose(torch.ones(9), torch.randn(9, 3), 4, 1.0).nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_keeping_all_changes_nothing(family: str) -> None:
    model, inputs = getattr(models, family)(), one_image(family)
    plain, _, _ = generate(model, inputs)
    for keep in (1.0, 10_000):
        assert torch.equal(generate(model, inputs, VisPruner(keep=keep))[0], plain)


def test_the_read_layer_and_its_features_decide() -> None:
    model, inputs = models.llava(), one_image("llava")
    ((_, selection),) = towers.watched(model, inputs, VisPruner(keep=6))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    attention = tower.attentions[-2][0, :, 0, 1:].mean(0)
    assert torch.equal(selection.keep, choose(attention, tower.hidden_states[-2][0, 1:], 6, 0.5))
    assert int(selection.keep.sum()) == 6


def test_tiles_keep_a_share_each_and_lose_newlines() -> None:
    model, inputs = models.llava_next(), one_image("llava_next")
    ((view, selection),) = towers.watched(model, inputs, VisPruner(keep=20))
    assert int((selection.keep & view.candidates).sum()) == 20
    assert int(selection.keep[:16].sum()) == 4  # the base view's fifth
    _, _, run = generate(model, inputs, VisPruner(crop_keep=3))
    assert run.visual_tokens_kept == [15]


def test_a_batch_gives_what_its_samples_give() -> None:
    model = models.llava()
    batch, singles = mixed_batch()
    together, _, _ = generate(model, batch, VisPruner(keep=5))
    for row, single in enumerate(singles):
        alone, _, _ = generate(model, single, VisPruner(keep=5))
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [models.llava, towers.siglip])
def test_low_precision_and_towers_without_cls(build, dtype) -> None:
    logits, _, run = generate(build(dtype=dtype), one_image("llava", dtype=dtype), VisPruner(keep=5))
    assert not logits.isnan().any()
    assert run.visual_tokens_kept == [5]


def test_joined_patches_are_ranked_by_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    attention, features = torch.rand(2, 16, 1, generator=generator), torch.randn(16, 6, generator=generator)
    view = towers.joined_view({"attention": attention}, features)
    kept = VisPruner(keep=8)._select(0, view)
    cells = attention.view(2, 8, 2).mean(-1)
    expected = [choose(cells[k], features[8 * k : 8 * k + 8], 4, 0.5) for k in range(2)]
    assert torch.equal(kept, torch.cat(expected))


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_every_family_keeps_the_budget(family: str, positions) -> None:
    model, picture = families.build(family), families.FAMILIES[family].picture(2, 0)
    inputs = families.inputs(family, ([picture], [7, 9]))
    logits, _, after = generate(model, inputs, VisPruner(keep=5, positions=positions), max_new_tokens=2)
    assert after.visual_tokens_kept == [5]
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"keep": 1.5}, {"important_ratio": 1.1}, {"important_ratio": -0.1}, {"crop_keep": 0}]
)
def test_impossible_options(options) -> None:
    with pytest.raises(UsageError), attach(models.llava(), VisPruner(**options)):
        pass
