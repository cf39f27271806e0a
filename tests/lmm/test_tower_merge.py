"""Merging inside the vision tower of a running model against ToMe written out layer by layer."""

from __future__ import annotations

import models
import pytest
import torch
from running import FAMILIES, GENERATE, families, generate, hook_count, implementations, mixed_batch, one_image
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from vislm import VHR, FastV, FlowCut, RandomPruning, attach
from vislm.errors import PlanConflict, UsageError
from vislm.kernels.matching import bipartite_soft_matching
from vislm.lmm.interventions import ImageView, PromptStage, Selection, TowerRecord, TowerSignal
from vislm.lmm.tower.merging import HOME, SIZE, with_tower_merges
from vislm.token_pruning.tome import ToMe


def siglip(dtype=torch.float32):
    _, text = models.configs()
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=40, patch_size=8
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=models.IMAGE_TOKEN)
    config.vision_feature_layer, config.vision_feature_select_strategy = -1, "full"
    return models._finish(LlavaForConditionalGeneration(config), dtype)


TOWERS = {"clip": models.llava, "siglip": siglip}
towers = pytest.mark.parametrize("tower", TOWERS)


def picture(model, count=1, seed=0):
    side = model.config.vision_config.image_size
    pixels = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed)).to(model.dtype)
    tokens = (side // model.config.vision_config.patch_size) ** 2
    return {"input_ids": models.prompt(7, 8, 9, tokens=tokens, images=count), "pixel_values": pixels}


def by_hand(model, pixels, schedule, prop_attn=True):
    """Return the projected tokens (B, n, C), ascending by seat, their seats (B, n), sizes (B, n) and sources (B, N)."""
    tower = model.model.vision_tower
    prefix = int(hasattr(tower, "pre_layrnorm"))
    x = tower.embeddings(pixels)
    x = tower.pre_layrnorm(x) if prefix else x
    sizes, home = torch.ones(x.shape[:2]), torch.arange(x.shape[1]).expand(x.shape[:2])
    source = home
    for layer, r in zip(tower.encoder.layers, schedule, strict=False):
        normed = layer.layer_norm1(x)
        mask = sizes.log()[:, None, None].to(x.dtype) if prop_attn else None
        x = x + layer.self_attn(normed, attention_mask=mask)[0]
        keys = layer.self_attn.k_proj(normed).unflatten(-1, (2, -1)).mean(2)
        matching = bipartite_soft_matching(keys, r, class_token=bool(prefix))
        x, sizes = matching.merge(x, sizes)
        home, source = home.gather(1, matching.kept), matching.index.gather(1, source)
        x = x + layer.mlp(layer.layer_norm2(x))
    seats, order = home[:, prefix:].sort(1)
    rank = order.argsort(1)
    x, sizes = x[:, prefix:], sizes[:, prefix:]
    x = x.gather(1, order[..., None].expand_as(x))
    source = rank.gather(1, source[:, prefix:] - prefix)
    return model.model.multi_modal_projector(x), seats - prefix, sizes.gather(1, order), source


@torch.no_grad()
@towers
@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("r", [2, (3, 2, 1), (0, 0, 0, 4), (4, 0, 2)], ids=str)
def test_features_seats_and_sizes_are_those_of_tome(tower, prop_attn, r) -> None:
    model = TOWERS[tower](dtype=torch.float64)
    inputs = picture(model, count=2)
    layers = model.config.vision_config.num_hidden_layers - (tower == "clip")
    schedule = [*r, *[0] * layers][:layers] if isinstance(r, tuple) else [r] * layers
    tokens, seats, sizes, source = by_hand(model, inputs["pixel_values"], schedule, prop_attn)
    with attach(model, ToMe(r=r, prop_attn=prop_attn)) as session:
        encoded = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        model(**inputs)
        run, prompt = session.last_run, session._state.prompt
    for image, features in enumerate(encoded.pooler_output):
        alive = ~features.isnan().any(-1)
        assert alive.nonzero().flatten().tolist() == seats[image].tolist() == run.stages[-1].index[image]
        torch.testing.assert_close(features[alive], tokens[image], atol=1e-5, rtol=1e-6)
        assert prompt.size[0][prompt.image_of[0] == image].tolist() == sizes[image].tolist()
    assert run.stages[-1].merged_into == source.tolist()
    patches = (model.config.vision_config.image_size // 8) ** 2
    entered = [patches - sum(schedule[:layer]) for layer in range(len(run.tower_tokens))]
    assert run.tower_tokens == entered


@torch.no_grad()
@towers
def test_the_language_model_reads_the_merged_tokens_in_the_order_of_their_seats(tower) -> None:
    model = TOWERS[tower]()
    inputs = picture(model)
    layers = model.config.vision_config.num_hidden_layers - (tower == "clip")
    tokens, seats, _, _ = by_hand(model, inputs["pixel_values"], [2] * layers)
    logits, _, run = generate(model, inputs, ToMe(r=2))
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    features.pooler_output = [tokens[0]]
    short = {"input_ids": models.prompt(7, 8, 9, tokens=seats.shape[1]), "mm_encoder_outputs": {"image": features}}
    torch.testing.assert_close(logits, torch.stack(model.generate(**short, **GENERATE).logits), atol=1e-4, rtol=0)
    original, _, _ = generate(model, inputs, ToMe(r=2, positions="original"))
    assert (original - logits).abs().max() > 1e-3
    assert run.visual_tokens_kept == [seats.shape[1]]


@families
@pytest.mark.parametrize("keep", [5, 0.5, 1.0])
def test_keep_is_reached_exactly_and_all_is_bit_identical(family, keep) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    logits, _, run = generate(model, inputs, ToMe(keep=keep))
    if keep == 1.0:
        assert torch.equal(logits, torch.stack(model.generate(**inputs, **GENERATE).logits))
        assert not run.tower_tokens
        return
    wanted = 5 if keep == 5 else 8
    assert run.tower_tokens[-1] == wanted
    if family == "llava":
        assert run.visual_tokens_kept == [wanted]
    else:  # every crop keeps that many; the tiles' borders are padding
        assert wanted <= run.visual_tokens_kept[0] <= 5 * wanted


@pytest.mark.parametrize("calibrate", [False, True])
def test_batch_equals_singles(calibrate) -> None:
    model, method = models.llava(), ToMe(keep=5, calibrate=calibrate)
    batch, singles = mixed_batch()
    together, _, run = generate(model, batch, method)
    merged: list[list[int]] = []
    for row, inputs in enumerate(singles):
        alone, _, single = generate(model, inputs, method)
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=1e-4, rtol=0)
        merged += single.stages[-1].merged_into if single.stages else []
    assert run.stages[-1].merged_into == merged


@families
def test_tiles_are_merged_one_by_one_and_their_padding_and_newlines_are_counted(family) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    with torch.no_grad(), attach(model, ToMe(r=2)) as session:
        model(**inputs)
        run, prompt = session.last_run, session._state.prompt
    (kept,), (into,) = run.stages[-1].index, run.stages[-1].merged_into
    sizes = prompt.size[0][prompt.image_of[0] == 0]
    assert [into[token] for token in kept] == list(range(len(kept)))
    members = torch.tensor([token for token in into if token >= 0]).bincount(minlength=len(kept))
    assert (members <= sizes).all()  # what lies in a tile's border has no token of its own
    if family == "llava":
        assert members.tolist() == sizes.tolist()
    assert (sizes >= 1).all()


def test_merging_composes_with_later_methods_and_sizes_add_up() -> None:
    model, inputs = models.llava(), one_image("llava")
    with torch.no_grad(), attach(model, ToMe(r=1), RandomPruning(keep=6, positions="contiguous")) as session:
        model(**inputs)
        run, prompt = session.last_run, session._state.prompt
    assert run.tower_tokens[-1] == 11
    assert run.visual_tokens_kept == [6]
    into = torch.tensor(run.stages[-1].merged_into[0])
    assert into[into >= 0].bincount().tolist() == prompt.size[0][prompt.image_of[0] == 0].tolist()
    logits, _, run = generate(model, inputs, ToMe(keep=8), FastV(keep=4), VHR(alpha=2.0))
    assert torch.isfinite(logits).all()
    assert run.visual_tokens_kept == [4]


def test_calibration_weighs_tokens_by_what_they_stand_for() -> None:
    model, inputs = models.llava(), one_image("llava")
    plain, _, _ = generate(model, inputs, ToMe(keep=5))
    calibrated, _, _ = generate(model, inputs, ToMe(keep=5, calibrate=True))
    assert (plain - calibrated).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@towers
def test_half_precision_is_finite_and_close(tower, dtype) -> None:
    model = TOWERS[tower](dtype=dtype)
    logits, _, _ = generate(model, picture(model), ToMe(r=2))
    assert torch.isfinite(logits).all()
    with torch.no_grad(), attach(model, ToMe(r=2)):
        found = model.model.get_image_features(picture(model)["pixel_values"], return_dict=True).pooler_output[0]
    layers = model.config.vision_config.num_hidden_layers - (tower == "clip")
    with torch.no_grad():
        tokens, seats, _, _ = by_hand(model, picture(model)["pixel_values"], [2] * layers)
    assert found[seats[0]].isfinite().all()
    error = (found[seats[0]] - tokens[0]).float().norm() / tokens[0].float().norm()
    assert error < 12 * torch.finfo(dtype).eps  # of four layers


@families
def test_beams_start_from_the_greedy_prefill(family) -> None:
    model, inputs = FAMILIES[family](), one_image(family)
    logits, _, _ = generate(model, inputs, ToMe(keep=5), num_beams=3)
    greedy, _, _ = generate(model, inputs, ToMe(keep=5))
    torch.testing.assert_close(logits[0, :1], greedy[0], atol=1e-4, rtol=0)


def test_nothing_stays_behind() -> None:
    model, inputs = models.llava(), one_image("llava")
    before = torch.stack(model.generate(**inputs, **GENERATE).logits)
    hooks = hook_count(model)
    with pytest.raises(ZeroDivisionError), attach(model, ToMe(keep=5)):
        model.generate(**inputs, **GENERATE)
        raise ZeroDivisionError
    assert hook_count(model) == hooks
    assert implementations(model) == ("sdpa", "sdpa")
    assert torch.equal(torch.stack(model.generate(**inputs, **GENERATE).logits), before)
    with attach(model, ToMe(keep=5)), attach(model, VHR(alpha=2.0)):
        nested = torch.stack(model.generate(**inputs, **GENERATE).logits)
    assert torch.equal(nested, generate(model, inputs, ToMe(keep=5), VHR(alpha=2.0))[0])


def test_images_encoded_before_attaching_stay_whole() -> None:
    model, inputs = models.llava(), one_image("llava")
    with torch.no_grad():
        encoded = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        with attach(model, ToMe(keep=5)) as session:
            model(**inputs)
            model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": encoded})
            assert session.last_run.visual_tokens_kept == [16]


def test_tokens_that_the_model_pools_count_what_their_patches_stand_for() -> None:
    home = torch.tensor([[0, 0, 2, 2, 0, 5, 2, 5]]).float().unsqueeze(-1)
    size = torch.tensor([[3, 0, 3, 0, 0, 2, 0, 0]]).float().unsqueeze(-1)
    view = ImageView(torch.zeros(3, 4), torch.ones(3, dtype=torch.bool), 0, 0, {})
    view.tower = TowerRecord({HOME: home, SIZE: size}, None, None)
    view.pack = lambda maps, newline: torch.cat(
        [maps[0].unflatten(0, (2, 4)).mean(1), torch.full_like(maps[0, :1], newline)]
    )
    found = with_tower_merges(Selection(torch.tensor([True, True, True])), view)
    assert found.size.tolist() == [1.5, 0.5, 1.0]
    assert found.source is None
    view.pack = lambda maps, newline: torch.cat([maps[0, :6], torch.full_like(maps[0, :1], newline)])
    keep = torch.tensor([True, False, True, False, False, False, True])
    found = with_tower_merges(Selection(keep), view)
    assert found.size.tolist() == [3, 3, 1]
    assert found.source.tolist() == [0, 0, 1, 1, 0, -1, 2]
    joined = Selection(keep, torch.zeros(3, 4), None, torch.tensor([0, -1, 1, -1, -1, 0, 2]))
    assert with_tower_merges(joined, view).size.tolist() == [5, 3, 1]
    assert with_tower_merges(joined, view).source.tolist() == [0, 0, 1, 1, 0, 0, 2]


class LooksAtTheTower:
    name = "looking"

    def plan(self, adapter):
        signal = TowerSignal(0, lambda call: call.key.mean(1))
        return [PromptStage(lambda view: view.candidates, "contiguous", {"keys": signal})]


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ((ToMe(keep=5), FlowCut(keep=5)), PlanConflict, "tome and flowcut both prune the tower"),
        ((ToMe(keep=5), LooksAtTheTower()), PlanConflict, "looking needs the whole vision tower's signals, but tome"),
        ((ToMe(keep=5, r=3),), UsageError, "keep=5 and r=3: give one of them"),
        ((ToMe(r=(9,) * 6),), UsageError, "r has 6 numbers, expected at most one for each of 5"),
        ((ToMe(r=-1),), UsageError, r"r=\(-1, 0.0\)"),
        ((ToMe(r=(3, 2), inflection=1.0),), UsageError, "inflection=1.0 with a list"),
        ((ToMe(keep=5, inflection=1.0),), UsageError, "needs r="),
    ],
)
def test_refusals(methods, error, message) -> None:
    with pytest.raises(error, match=message), attach(models.llava(), *methods):
        pass


def test_a_decreasing_schedule() -> None:
    _, _, run = generate(models.llava(), one_image("llava"), ToMe(r=2, inflection=-1.0))
    assert run.tower_tokens == [16, 12, 9, 7, 6, 6]
