"""VFlowOpt's fixtures: the importance of a SigLIP tower, recycling on packed tiles, the stages inside the decoder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionModel,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vislm.golden.checks._models import TEXT_KEYS
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, difference, exact, relative
from vislm.lmm.adapters import Adapter
from vislm.lmm.adapters.llava import Grid
from vislm.lmm.decoder.attention import NAME, AttentionCall
from vislm.lmm.hooks import Hooks
from vislm.lmm.interventions import ImageView, LanguageStage, PromptStage
from vislm.lmm.session import attach
from vislm.token_pruning.vflowopt import VFlowOpt
from vislm.token_pruning.vflowopt import map as maps
from vislm.token_pruning.vflowopt.recycling import cell_numbers, recycle, stage_counts


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Tell the kinds apart by the tensors that they hold."""
    if "pixel_values" in fixture.inputs:
        yield from _importance(fixture)
    elif "crop_importance" in fixture.inputs:
        yield from _recycling(fixture)
    elif "inputs_embeds" in fixture.inputs:
        yield from _language(fixture)
    else:
        raise Unhandled(f"inputs {sorted(fixture.inputs)} belong to no known VFlowOpt fixture")


def _importance(fixture: Fixture) -> Iterator[Comparison]:
    options, out, pixels = fixture.kwargs, fixture.outputs, fixture.inputs["pixel_values"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    config = SiglipVisionConfig(
        **{n: options[n] for n in (*names, "hidden_act", "layer_norm_eps")}, vision_use_head=False
    )
    config._attn_implementation = NAME
    tower = SiglipVisionModel(config).eval()
    state = {k.removeprefix("vision_model."): v for k, v in fixture.params.items()}
    own = {k.removeprefix("vision_model."): k for k in tower.state_dict()}
    missing = tower.load_state_dict({own[k]: v for k, v in state.items()}, strict=False).missing_keys
    if any("post_layernorm" not in name for name in missing):
        raise Unhandled(f"the fixture lacks {missing}")
    calls: list[AttentionCall] = []

    def take(call: AttentionCall, heads: Tensor) -> Tensor:
        calls.append(call)
        return heads

    hooks = Hooks()
    hooks.watch(tower.get_submodule(_layers(tower))[options["scored_layer_index"]].self_attn, take)  # pyright: ignore[reportIndexIssue]
    try:
        with torch.no_grad():
            hidden = tower(pixels, output_hidden_states=True).hidden_states
    finally:
        hooks.remove()
    entropy = maps.patch_entropy(maps.grey_levels(pixels, "wrapped", "siglip"), options["patch_size"])
    if "patch_entropy" in out:
        yield relative("patch_entropy", entropy, out["patch_entropy"], 1e-4, 1e-5)
    if "attention_scored_layer" in out:
        rows = calls[0].rows(torch.arange(entropy.shape[1]))
        yield difference("attention_scored_layer", rows, out["attention_scored_layer"], 1e-4)
    mean = maps.context(calls[0], options["t"], prefix=0, empty_anchors="strongest")
    yield difference("importance", maps.importance(mean, entropy, options["alpha"]), out["importance"], 1e-4)
    if "last_layer_output" in out:
        yield relative("last_layer_output", hidden[-1], out["last_layer_output"], 1e-3, 1e-4)


def _layers(tower: SiglipVisionModel) -> str:
    return next(n for n, _ in tower.named_modules() if n.endswith("encoder.layers"))


def _recycling(fixture: Fixture) -> Iterator[Comparison]:
    """Pack crops as LLaVA-OneVision does, map and features alike, then drop and recycle."""
    options, out, inputs = fixture.kwargs, fixture.outputs, fixture.inputs
    side, (width, height) = options["patches_per_side"], options["image_size_wh"]
    model = _packing_model(side, options)
    newline = inputs["image_newline"]
    features, score = (
        model.pack_image_features(
            [crops], torch.tensor([[height, width]]), end, vision_aspect_ratio=f"anyres_max_{options['anyres_max']}"
        )[0][0]
        for crops, end in (
            (inputs["crop_features"], newline),
            (inputs["crop_importance"].unsqueeze(-1), newline.new_ones(1)),
        )
    )
    score = score.squeeze(-1)
    ends = ((features[side * side :] == newline).all(-1)).nonzero().flatten()
    stride = int(ends[0]) + 1
    rows = (len(features) - side * side) // stride
    grids = [Grid(side, side, 0, side), Grid(rows, stride - 1, side * side, stride)]
    cells = cell_numbers(grids, len(features), options["cell_side"])
    drop, recycled = stage_counts(len(features), len(features), options["retention_r1"], options["cell_side"])
    chosen = recycle(features, score, cells, drop, recycled)
    assert chosen.features is not None
    yield exact("num_tokens", len(chosen.features), out["num_tokens"])
    yield relative("importance_after", score[chosen.keep], out["importance_after"], 1e-5, 1e-4)
    yield relative("visual_embeds", chosen.features, out["visual_embeds"], 1e-3, 1e-4)


def _packing_model(side: int, options: dict[str, Any]) -> LlavaOnevisionModel:
    """Return a model whose crops have ``side`` patches a side and whose only tiling is that of the fixture."""
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=side, patch_size=1
    )
    text = Qwen2Config(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=8,
    )
    pinpoints = [[options["grid_h"] * side, options["grid_w"] * side]]
    return LlavaOnevisionModel(
        LlavaOnevisionConfig(vision_config=vision, text_config=text, image_grid_pinpoints=pinpoints)
    )


@dataclass(frozen=True)
class Given:
    """VFlowOpt's stages inside the language model, with an importance (n,) that is given instead of computed."""

    method: VFlowOpt
    importance: Tensor

    @property
    def name(self) -> str:
        """The method's own name."""
        return self.method.name

    def plan(self, adapter: Adapter) -> Sequence[PromptStage | LanguageStage]:
        """Return a stage that stores the importance and drops nothing, and the method's language stages."""
        return [PromptStage(self._store, self.method.positions), *self.method.language_stages(adapter)]

    def _store(self, view: ImageView) -> Tensor:
        view.memory["importance"] = {view.image: self.importance}
        return torch.ones_like(view.candidates)


def _language(fixture: Fixture) -> Iterator[Comparison]:
    options, out, embeds = fixture.kwargs, fixture.outputs, fixture.inputs["inputs_embeds"]
    start, count, layers = options["image_start"], options["image_tokens"], tuple(options["prune_before_layers"])
    second, third = options["stage_retention"]
    official = layers[0] > 0  # the layer before the first cut then attends in both directions
    method = VFlowOpt(R1=1.0, R2=second, R3=third, layers=layers, unmasked_layer=official)
    text = torch.cat([embeds[0, :start], embeds[0, start + count :]])
    model = _qwen2(fixture, text, count)
    ids = torch.arange(len(text))
    ids = torch.cat([ids[:start], torch.full((count,), len(text)), ids[start:]]).unsqueeze(0)
    images = {"image": BaseModelOutputWithPooling(pooler_output=[embeds[0, start : start + count]])}  # pyright: ignore[reportArgumentType]
    with torch.no_grad(), attach(model, Given(method, fixture.inputs["importance"])) as session:
        output = model(input_ids=ids, mm_encoder_outputs=images, use_cache=True, output_hidden_states=True)
        run = session.last_run
    assert run is not None
    yield exact("kv_lengths", run.layer_tokens, out["kv_lengths"])
    before = [embeds.shape[1], *run.layer_tokens]  # the official code notes a layer's length before its removal
    for layer in range(options["num_hidden_layers"]):
        if f"hidden_in_layer{layer}_len" in out:
            yield exact(f"hidden_in_layer{layer}_len", before[layer], out[f"hidden_in_layer{layer}_len"])
    yield relative("last_hidden_state", output.hidden_states[-1], out["last_hidden_state"], 1e-3, 1e-4)


def _qwen2(fixture: Fixture, text_embeddings: Tensor, visual_tokens: int) -> LlavaForConditionalGeneration:
    """Return a LLaVA model around the fixture's Qwen2; token i embeds as ``text_embeddings[i]``."""
    rows, options = len(text_embeddings), fixture.kwargs
    text = Qwen2Config(
        **{n: options[n] for n in (*TEXT_KEYS, "rms_norm_eps")},
        rope_parameters={"rope_type": "default", "rope_theta": options["rope_theta"]},
        vocab_size=rows + 1,
    )
    side = 2 * math.ceil(visual_tokens**0.5)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=side, patch_size=1
    )
    config = LlavaConfig(vision_config=vision, text_config=text)
    config.image_token_id = rows
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation("sdpa")
    state = {k.removeprefix("model."): v for k, v in fixture.params.items() if "embed_tokens" not in k}
    table = torch.cat([text_embeddings, torch.zeros(1, text.hidden_size)])
    model.model.language_model.load_state_dict({**state, "embed_tokens.weight": table})
    return model.eval()
