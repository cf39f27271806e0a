"""Every family under prompt, language, head and tower stages, against the untouched model."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import families
import pytest
import torch
from families import FAMILIES, GLOBAL, IMAGE, LAYERS, VIDEO
from running import GENERATE, KeepGiven, generate, hook_count, implementations
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vislm import VHR, FastV, FlowCut, RandomPruning, attach
from vislm.errors import PlanConflict, UsageError
from vislm.lmm.adapters import adapter_for
from vislm.lmm.cost.flops import DecoderShape
from vislm.lmm.interventions import LanguageStage
from vislm.lmm.prompt.positions import renumber

every_family = pytest.mark.parametrize("family", FAMILIES)
IN_TOWER = ("llava", "llava_next", "llava_onevision", "qwen2_vl")


@dataclass(frozen=True)
class KeepInside:
    """Keeps chosen tokens of every image from decoder layer ``layer`` on."""

    keep: tuple[int, ...] = (0, 2, 3, 5)
    layer: int = 3
    positions: str = "original"
    name = "inside"

    def plan(self, adapter):
        return [LanguageStage(self.layer, None, lambda call: None, self.select, self.positions)]

    def select(self, view) -> Tensor:
        return (view.image_of < 0) | torch.isin(view.token_of, torch.tensor(self.keep))


METHODS = {
    "prompt": (KeepGiven((0, 2, 3, 5)),),
    "prompt-contiguous": (KeepGiven((0, 2, 3, 5), "contiguous"),),
    "language": (KeepInside(),),
    "language-contiguous": (KeepInside(positions="contiguous"),),
    "fastv": (FastV(keep=3, layer=2),),
    "vhr": (VHR(alpha=2.0),),
    "all": (KeepGiven((0, 1, 2, 3, 5)), KeepInside((0, 3, 5), 3), VHR(alpha=2.0, text_stream="image_only")),
}
every_method = pytest.mark.parametrize("method", METHODS)
some_methods = pytest.mark.parametrize("method", ["prompt-contiguous", "language-contiguous", "all"])


@functools.cache
def built(family: str, seed: int = 0, dtype: torch.dtype = torch.float32):
    return families.build(family, seed, dtype)


def one(family: str, shape: int = 0, seed: int = 0, words: tuple[int, ...] = (7, 8, 9), **options) -> dict[str, Tensor]:
    return families.inputs(family, ([FAMILIES[family].picture(shape, seed)], list(words)), **options)


def mixed(family: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Left padding; one image, two images of other shapes, none."""
    picture = FAMILIES[family].picture
    prompts = [([picture(0, 0)], [7, 8, 9]), ([picture(1, 1), picture(2, 2)], [7]), ([], [9, 10, 11])]
    return families.inputs(family, *prompts), [families.inputs(family, prompt) for prompt in prompts]


def visual_columns(inputs: dict[str, Tensor]) -> list[int]:
    ids = inputs["input_ids"][0]
    return ((ids == IMAGE) | (ids == VIDEO)).nonzero().flatten().tolist()


def masked_reference(family: str, model, inputs, hidden: list[int], steps: int, from_layer: int = 0) -> Tensor:
    """Greedy logits of the untouched full-length model in which every later query is blind to the hidden columns."""
    inputs, logits = dict(inputs), []
    for _ in range(steps):
        width = inputs["input_ids"].shape[1]
        mask = torch.ones(1, 1, width, width, dtype=torch.bool).tril()
        blind = mask.clone()
        blind[..., hidden] = False
        blind |= torch.eye(width, dtype=torch.bool)
        handles = []
        for number, layer in enumerate(adapter_for(model).layers):
            chosen = blind if number >= from_layer else mask

            def replace(module, args, kwargs, chosen=chosen):
                return args, {**kwargs, "attention_mask": chosen}

            handles.append(layer.register_forward_pre_hook(replace, with_kwargs=True))
        with torch.no_grad():
            out = model(**inputs, use_cache=False, attention_mask=torch.ones_like(inputs["input_ids"]))
        for handle in handles:
            handle.remove()
        logits.append(out.logits[:, -1])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], out.logits[:, -1:].argmax(-1)], 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
    return torch.stack(logits)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# -- against the untouched model -------------------------------------------------------------------------------------
@every_family
@pytest.mark.parametrize(
    "neutral",
    [(), (RandomPruning(keep=1.0),), (FastV(keep=1.0, layer=2),), (FlowCut(keep=1.0, layer=2),), (VHR(alpha=1.0),)],
    ids=["nothing", "random", "fastv", "flowcut", "vhr"],
)
def test_keeping_everything_is_bit_identical(family, neutral) -> None:
    model, inputs = built(family), mixed(family)[0]
    plain = model.generate(**inputs, **GENERATE)
    logits, out, run = generate(model, inputs, *neutral)
    assert torch.equal(torch.stack(plain.logits), logits)
    for ours, theirs in zip(out.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    assert run.visual_tokens_kept == run.visual_tokens
    with torch.no_grad(), attach(model, *neutral):
        forward = model(**inputs, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(forward, model(**inputs, use_cache=False).logits)


@every_family
@pytest.mark.parametrize("shape", [0, 2])
def test_dropping_before_the_language_model_equals_masking(family, shape) -> None:
    model, inputs = built(family), one(family, shape)
    keep = (0, 2, 3, 5)
    logits, out, run = generate(model, inputs, KeepGiven(keep), max_new_tokens=5)
    columns = visual_columns(inputs)
    hidden = [column for place, column in enumerate(columns) if place not in keep]
    close(logits, masked_reference(family, model, inputs, hidden, 5))
    assert run.stages[0].index == [list(keep)]
    assert run.layer_tokens == [inputs["input_ids"].shape[1] - len(hidden)] * LAYERS
    assert [c.keys.shape[-2] for c in out.past_key_values.layers] == [n + 4 for n in run.layer_tokens]


@every_family
@pytest.mark.parametrize("layer", [2, 4])
def test_dropping_inside_the_language_model_equals_masking(family, layer) -> None:
    model, inputs = built(family), one(family)
    logits, out, run = generate(model, inputs, KeepInside(layer=layer), max_new_tokens=5)
    hidden = [column for place, column in enumerate(visual_columns(inputs)) if place not in (0, 2, 3, 5)]
    close(logits, masked_reference(family, model, inputs, hidden, 5, layer))
    full = inputs["input_ids"].shape[1]
    assert run.layer_tokens == [full] * layer + [full - len(hidden)] * (LAYERS - layer)
    assert [c.keys.shape[-2] for c in out.past_key_values.layers] == [n + 4 for n in run.layer_tokens]


@pytest.mark.parametrize("family", [name for name, own in FAMILIES.items() if own.video])
@pytest.mark.parametrize("place", ["prompt", "language"])
def test_videos_and_images_in_one_prompt(family, place) -> None:
    own = FAMILIES[family]
    assert own.video is not None
    model = built(family)
    inputs = families.inputs(family, ([own.video(1), own.picture(0, 0)], [7, 8]))
    method = KeepGiven((0, 2, 3, 5)) if place == "prompt" else KeepInside()
    logits, _, run = generate(model, inputs, method, max_new_tokens=5)
    assert len(run.visual_tokens) == 2
    assert run.visual_tokens_kept == [4, 4]
    columns, hidden = iter(visual_columns(inputs)), []
    for count in run.visual_tokens:
        hidden += [column for token, column in zip(range(count), columns, strict=False) if token not in (0, 2, 3, 5)]
    close(logits, masked_reference(family, model, inputs, hidden, 5, 0 if place == "prompt" else 3))
    assert run.spans[0] is not None
    assert run.spans[0][0] in (2, 3)


# -- batches, caches, precision --------------------------------------------------------------------------------------
@every_family
@every_method
def test_a_padded_batch_equals_its_singles(family, method) -> None:
    model = built(family)
    batch, singles = mixed(family)
    together, _, run = generate(model, batch, *METHODS[method])
    kept = []
    for row, inputs in enumerate(singles):
        alone, _, single = generate(model, inputs, *METHODS[method])
        close(together[:, row], alone[:, 0])
        kept += single.visual_tokens_kept
    assert run.visual_tokens_kept == kept
    assert len(kept) == 3


@every_family
@some_methods
def test_beam_search_starts_from_the_greedy_prefill(family, method) -> None:
    model, inputs = built(family), mixed(family)[0]
    logits, out, run = generate(model, inputs, *METHODS[method], num_beams=2)
    greedy, _, _ = generate(model, inputs, *METHODS[method])
    close(logits[0, ::2], greedy[0])
    assert torch.isfinite(logits).all()
    assert run.batch == 6
    assert out.sequences.shape == (3, inputs["input_ids"].shape[1] + 6)


@every_family
@some_methods
def test_half_precision_is_finite(family, method) -> None:
    model = built(family, dtype=torch.bfloat16)
    logits, _, _ = generate(model, one(family, dtype=torch.bfloat16), *METHODS[method])
    assert torch.isfinite(logits).all()


@every_family
@some_methods
def test_scoring_without_cache_equals_cached_scoring(family, method) -> None:
    """Non-contiguous positions without a mask would be taken for packed documents by transformers."""
    model, inputs = built(family), one(family)
    with torch.no_grad(), attach(model, *METHODS[method]):
        cached = model(**inputs, use_cache=True).logits[:, -1]
        plain = model(**inputs, use_cache=False).logits[:, -1]
    close(plain, cached)
    generated, _, _ = generate(model, inputs, *METHODS[method])
    close(generated[0], cached)


@every_family
@some_methods
def test_a_loop_over_the_forward_equals_generate(family, method) -> None:
    """Without generate nobody counts positions; Qwen's own count was made for another prompt."""
    model, inputs, other = built(family), one(family), one(family, 2)
    generated, _, _ = generate(model, inputs, *METHODS[method])
    model.generate(**other, **GENERATE)
    with torch.no_grad(), attach(model, *METHODS[method]):
        out, logits = model(**inputs, use_cache=True), []
        for _ in range(6):
            logits.append(out.logits[:, -1])
            word = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=word, past_key_values=out.past_key_values, use_cache=True)
    close(torch.stack(logits), generated)


@every_family
def test_no_images_at_all(family) -> None:
    model = built(family)
    inputs = families.inputs(family, ([], [7, 8, 9]), ([], [9, 10]))
    plain = torch.stack(model.generate(**inputs, **GENERATE).logits)
    for method in ("prompt", "language-contiguous", "fastv"):
        logits, _, run = generate(model, inputs, *METHODS[method])
        assert torch.equal(logits, plain)
        assert run.visual_tokens == []


@every_family
def test_a_second_turn_gets_the_whole_conversation(family) -> None:
    model, inputs = built(family), one(family)
    with attach(model, *METHODS["prompt"]):
        first = model.generate(**inputs, **GENERATE)
        ids = first.sequences.where((first.sequences < 50) & (first.sequences > 0), 9)  # no markers, no padding
        ids[:, : inputs["input_ids"].shape[1]] = inputs["input_ids"]
        longer = dict(inputs, input_ids=torch.cat([ids, torch.tensor([[7, 8]])], 1))
        if "mm_token_type_ids" in inputs:
            extra = longer["input_ids"].shape[1] - inputs["input_ids"].shape[1]
            longer["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, extra))
        again = torch.stack(model.generate(**longer, **GENERATE).logits)
        with pytest.raises(UsageError, match="whole conversation"):
            model.generate(input_ids=longer["input_ids"], past_key_values=first.past_key_values, **GENERATE)
    hidden = [column for place, column in enumerate(visual_columns(inputs)) if place not in (0, 2, 3, 5)]
    close(again[:5], masked_reference(family, model, longer, hidden, 5))


@every_family
def test_a_second_turn_on_a_kept_cache(family) -> None:
    """Nothing is gone from the first layers, so generate's count is right; what was dropped stays dropped."""
    model, inputs = built(family), one(family)
    plain = {"suppress_tokens": [0, *range(50, 64)]}  # no padding and no markers in what becomes the prompt
    with attach(model, *METHODS["language"]):
        first = model.generate(**inputs, **GENERATE, **plain)
        longer = dict(inputs, input_ids=torch.cat([first.sequences, torch.tensor([[7, 8]])], 1))
        turn = {"input_ids": longer["input_ids"], "past_key_values": first.past_key_values}
        again = torch.stack(model.generate(**turn, **GENERATE).logits)
    if "mm_token_type_ids" in inputs:
        extra = longer["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        longer["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, extra))
    hidden = [column for place, column in enumerate(visual_columns(inputs)) if place not in (0, 2, 3, 5)]
    close(again[:5], masked_reference(family, model, longer, hidden, 5, 3))


def test_a_wrapped_method_gives_an_earlier_wrapper_back() -> None:
    model, inputs = families.build("llava"), one("llava")
    calls: list[int] = []
    encode = model.model.get_image_features

    @functools.wraps(encode)
    def earlier(*args, **kwargs):
        calls.append(1)
        return encode(*args, **kwargs)

    model.model.get_image_features = earlier
    generate(model, inputs, *METHODS["prompt"])
    assert calls == [1]
    assert model.model.get_image_features is earlier


# -- contiguous positions --------------------------------------------------------------------------------------------
@every_family
def test_contiguous_positions_begin_where_the_last_token_left_off(family) -> None:
    model, inputs = built(family), one(family)
    seen: list[Tensor] = []
    language = adapter_for(model).language_model
    handle = language.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with handle:
        logits, _, run = generate(model, inputs, *METHODS["prompt-contiguous"])
    original, _, _ = generate(model, inputs, *METHODS["prompt"])
    assert not torch.allclose(original, logits, atol=1e-2)
    text = seen[0] if seen[0].dim() == 2 else seen[0][0]
    assert text.tolist() == [list(range(run.layer_tokens[0]))]
    for before, after in itertools.pairwise(seen):
        assert (after[..., -1] == before[..., -1] + 1).all()


def test_renumbering_closes_rows_and_columns_of_a_picture() -> None:
    """Two words, a picture of 2 frames x 2 rows x 3 columns, a word; its second row and one column go."""
    time, rows, columns = torch.meshgrid(torch.arange(2), torch.arange(2), torch.arange(3), indexing="ij")
    picture = torch.stack([time * 5, rows, columns]).flatten(1) + 2
    words = torch.tensor([[0, 1]] * 3), torch.tensor([[5]] * 3)
    grid = torch.cat([words[0], picture, words[1]], 1).unsqueeze(1)
    image_of = torch.tensor([[-1, -1, *[0] * 12, -1]])
    index = torch.tensor([[0, 1, 2, 4, 8, 14]])  # row 0: columns 0 and 2, in the second frame column 0
    new, shift = renumber(grid, index, torch.ones_like(index, dtype=torch.bool), image_of)
    assert new[:, 0].tolist() == [[0, 1, 2, 2, 7, 4], [0, 1, 2, 2, 2, 4], [0, 1, 2, 3, 2, 4]]
    assert shift.flatten().tolist() == [1, 1, 1]
    everything = torch.arange(15).unsqueeze(0)
    same, shift = renumber(grid, everything, torch.ones_like(everything, dtype=torch.bool), image_of)
    assert torch.equal(same, grid)
    assert not shift.any()


# -- towers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", IN_TOWER)
@pytest.mark.parametrize("shape", [0, 1, 2])
def test_the_tower_loses_patches(family, shape) -> None:
    model, inputs = built(family), one(family, shape)
    method = FlowCut(keep=2, where="both", layer=2)
    logits, _, run = generate(model, inputs, method)
    assert torch.isfinite(logits).all()
    if family != "qwen2_vl":  # of four blocks, only what enters the merger is shorter here
        assert run.tower_tokens[-1] < run.tower_tokens[0]
    assert run.visual_tokens_kept[0] in (1, 2)
    assert 0 < run.flops["tower"] < run.flops["full_tower"]
    whole, _, _ = generate(model, inputs)
    assert not torch.allclose(whole, logits, atol=1e-2)


@pytest.mark.parametrize("family", IN_TOWER)
def test_a_batch_in_the_tower_equals_its_singles(family) -> None:
    model = built(family)
    batch, singles = mixed(family)
    method = FlowCut(keep=3, where="tower")
    together, _, run = generate(model, batch, method)
    kept = []
    for row, inputs in enumerate(singles):
        alone, _, single = generate(model, inputs, method)
        close(together[:, row], alone[:, 0])
        kept += [stage.index for stage in single.stages][-1] if single.stages else []
    assert run.stages[-1].index == kept


@pytest.mark.parametrize("family", IN_TOWER)
def test_patches_of_the_tower_that_change_nothing(family) -> None:
    """A tower that keeps everything, but is watched, computes the same bits."""
    model, inputs = built(family), one(family)
    plain, _, _ = generate(model, inputs)
    watched, _, _ = generate(model, inputs, FlowCut(keep=1.0, where="tower"))
    assert torch.equal(plain, watched)


def test_single_patches_of_qwens_tower_take_the_first_seats() -> None:
    model, inputs = built("qwen2_vl"), one("qwen2_vl", 2)
    _, _, cells = generate(model, inputs, FlowCut(keep=3, where="tower"))
    _, _, patches = generate(model, inputs, FlowCut(keep=3, where="tower", unit="patch"))
    assert patches.stages[0].index == [[0, 1, 2]]
    assert cells.visual_tokens_kept == patches.visual_tokens_kept == [3]
    assert cells.stages[0].index != patches.stages[0].index
    with pytest.raises(UsageError, match="multiple of 4"), attach(model, FlowCut(keep=3, tower_keep=6, where="tower")):
        pass


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in IN_TOWER])
def test_towers_that_cannot_be_pruned_say_why_and_what_to_do(family) -> None:
    model, inputs = built(family), one(family)
    with pytest.raises(
        PlanConflict, match=r"flowcut cannot act inside .*(pixel shuffle|cells|windows).*where='language'"
    ):
        generate(model, inputs, FlowCut(keep=3, where="tower"))
    _, _, run = generate(model, inputs, FlowCut(keep=3, layer=2))
    assert run.visual_tokens_kept == [3]


def test_deepstack_needs_a_later_layer() -> None:
    model = built("qwen3_vl")
    with pytest.raises(
        PlanConflict, match="fastv prunes before decoder layer 1, but qwen3_vl adds 2 deepstack tensors"
    ):
        generate(model, one("qwen3_vl"), FastV(keep=3, layer=1))


def test_pooled_frames_are_means_of_their_survivors() -> None:
    from vislm.lmm.tower.pruning import mix_survivors

    model = built("llava_onevision").model
    frames = torch.randn(2, 16, 8)
    frames[0, [0, 1, 4, 10]] = torch.nan
    pooled = mix_survivors(model.apply_pooling, frames)
    torch.testing.assert_close(pooled[0, 0], frames[0, 5])  # three of its four patches are gone
    torch.testing.assert_close(pooled[0, 3], frames[0, [11, 14, 15]].mean(0))
    torch.testing.assert_close(pooled[1], model.apply_pooling(frames[1:])[0])
    frames[0, 5] = torch.nan
    assert mix_survivors(model.apply_pooling, frames)[0, 0].isnan().all()


# -- bookkeeping -----------------------------------------------------------------------------------------------------
@every_family
@some_methods
def test_key_value_bytes_equal_the_cost_model(family, method) -> None:
    model = built(family)
    _, out, run = generate(model, one(family), *METHODS[method])
    lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert lengths == [n + run.new_tokens for n in run.layer_tokens]
    assert run.kv_bytes == DecoderShape.of(adapter_for(model).text_config).kv_bytes(lengths, 4)


@every_family
def test_flops_equal_torchs_counter(family) -> None:
    """torch counts the operations that really run; fused attention on the CPU is not among them."""
    model = built(family)
    inputs, _ = mixed(family)
    adapter, shapes = adapter_for(model), []
    handle = adapter.tower.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append({**_named(module, args), **kwargs}), with_kwargs=True
    )
    with torch.no_grad(), handle, FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    with torch.no_grad(), attach(model) as session:
        model(**inputs, logits_to_keep=1)
    flops = session.last_run.flops
    segments = adapter.tower_segments(shapes[0])
    width, decoder = adapter.tower_shape.width, DecoderShape.of(adapter.text_config)
    attention = sum(4 * width * n * n for layer in segments for n in layer)
    attention += 3 * LAYERS * 4 * inputs["input_ids"].shape[1] ** 2 * decoder.heads * decoder.head_dim
    ours = flops["tower"] + flops["prefill"]
    assert counter.get_total_flops() in (ours, ours - attention)


def _named(module, args) -> dict:
    import inspect

    return dict(zip(list(inspect.signature(type(module).forward).parameters)[1:], args, strict=False))


@every_family
def test_pack_is_the_models_own_packing(family) -> None:
    """Features taken for maps come out as the model's tokens; joined patches give their mean."""
    model = built(family)
    adapter, inputs = adapter_for(model), mixed(family)[0]
    with attach(model) as session, torch.no_grad():
        output = model.model.get_image_features(**{k: v for k, v in inputs.items() if k in _encoder_names(model)})
        encoding = session._state.encodings["image"]
    crops = adapter.crops(encoding.arguments)
    assert len(crops) == len(encoding.lengths)
    for entry, (own, length) in enumerate(zip(crops, encoding.lengths, strict=True)):
        patches = length * adapter.cell // own if adapter.patch_grid is None else 0
        patches = patches or adapter.patch_grid[0] * adapter.patch_grid[1]
        ones = adapter.pack(torch.ones(own, patches, 2), encoding.arguments, entry, -1.0)
        assert ones.shape == (length, 2)
        separators = (ones == -1).all(1)
        assert ((ones - 1).abs().amax(1)[~separators] < 1e-5).all()
        if adapter.has_token_features:
            assert torch.equal(~separators, adapter.is_patch(output.pooler_output[entry]))
    if adapter.has_token_features:
        prefix = adapter.tower_prefix
        features = output.hidden_states[adapter.read_layer + 1][:, prefix:]
        first = adapter.pack(features[: crops[0]], encoding.arguments, 0, 0.0)
        base = slice(0, 16)
        close(adapter.project(first[base]), output.pooler_output[0][base])
    else:
        with pytest.raises(PlanConflict, match="joins patches"):
            adapter.project(torch.zeros(1, 32))


def _encoder_names(model) -> set[str]:
    import inspect

    return set(inspect.signature(model.model.get_image_features).parameters)


def test_qwen25_packs_in_the_order_of_the_prompt() -> None:
    """A map of places, sorted by windows as the tower's rows are, comes back in raster order."""
    from transformers.vision_utils import get_vision_window_index

    model = built("qwen2_5_vl")
    thw = torch.tensor([[1, 4, 8]])
    order, _ = get_vision_window_index(thw, 2, 16, 4)
    assert order.tolist() != list(range(8))
    places = order.float().repeat_interleave(4).reshape(1, -1, 1)
    packed = adapter_for(model).pack(places, {"image_grid_thw": thw}, 0, 0.0)
    assert packed.flatten().tolist() == list(range(8))


@every_family
def test_grids_cover_the_patches(family) -> None:
    model, inputs = built(family), one(family)
    adapter = adapter_for(model)
    _, _, run = generate(model, inputs)
    grids = adapter.grids(run.features[0], run.spans[0])
    patches = adapter.is_patch(run.features[0])
    for grid in grids:
        rows = torch.arange(grid.height).unsqueeze(1) * grid.row_stride + torch.arange(grid.width)
        assert patches[rows + grid.start].all()
    last = grids[-1]
    assert last.start + (last.height - 1) * last.row_stride + last.width in (len(patches), len(patches) - 1)


def test_idefics_images_end_with_the_whole_view() -> None:
    model = built("smolvlm")
    inputs = families.inputs(
        "smolvlm", ([FAMILIES["smolvlm"].picture(0, 0), FAMILIES["smolvlm"].picture(1, 1)], [7]), ([], [8])
    )
    assert int((inputs["input_ids"] == GLOBAL).sum()) == 2
    _, _, run = generate(model, inputs, KeepGiven((0, 1)))
    assert run.visual_tokens == [80, 16]


@every_family
@some_methods
def test_everything_is_restored(family, method) -> None:
    model, inputs = built(family), one(family)
    plain = torch.stack(model.generate(**inputs, **GENERATE).logits)
    before, members = hook_count(model), set(vars(model.model))
    with attach(model, *METHODS[method]):
        model.generate(**inputs, **GENERATE)
        assert "get_image_features" in vars(model.model)
    assert (hook_count(model), set(vars(model.model))) == (before, members)
    assert implementations(model) == ("sdpa", "sdpa")

    def fail(module, args):
        raise KeyboardInterrupt

    with adapter_for(model).layers[3].register_forward_pre_hook(fail):
        with pytest.raises(KeyboardInterrupt), attach(model, *METHODS[method]):
            model.generate(**inputs, **GENERATE)
    assert set(vars(model.model)) == members
    assert implementations(model) == ("sdpa", "sdpa")
    assert torch.equal(torch.stack(model.generate(**inputs, **GENERATE).logits), plain)


@every_family
def test_two_models_pruned_differently_do_not_mix(family) -> None:
    first, second, inputs = built(family, 0), built(family, 1), one(family)
    alone = [generate(m, inputs, *METHODS[n])[0] for m, n in ((first, "prompt"), (second, "language"))]
    with attach(first, *METHODS["prompt"]), attach(second, *METHODS["language"]):
        for model, expected in zip((first, second), alone, strict=True):
            assert torch.equal(torch.stack(model.generate(**inputs, **GENERATE).logits), expected)


def test_a_mixture_of_experts_is_not_counted() -> None:
    from transformers import Qwen3MoeConfig

    with pytest.raises(UsageError, match="qwen3_moe is a mixture of experts"):
        DecoderShape.of(Qwen3MoeConfig())
