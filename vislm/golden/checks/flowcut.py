"""FlowCut's fixtures: score functions, whole CLIP towers, the language stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from vislm.golden.checks._models import Recorded, clip_tower, prefill_llama
from vislm.golden.fixtures import Comparison, Fixture, Unhandled, difference, exact, relative
from vislm.lmm.adapters import Adapter
from vislm.lmm.decoder.attention import NAME
from vislm.lmm.hooks import Hooks
from vislm.lmm.interventions import Intervention, TowerStage, TowerView
from vislm.lmm.session import attach
from vislm.lmm.tower.packed import PackedTowerPart
from vislm.token_pruning import flowcut
from vislm.token_pruning.flowcut import Flow, FlowCut


def check(fixture: Fixture) -> Iterator[Comparison]:
    """Tell the kinds apart by the tensors that they hold."""
    if "cls_attention" in fixture.inputs:
        yield from _scores(fixture)
    elif "relation" in fixture.inputs:
        yield from _qwen_scores(fixture)
    elif "pixel_values" in fixture.inputs:
        yield from _tower(fixture)
    elif "inputs_embeds" in fixture.inputs:
        yield from _language(fixture)
    elif "grid_thw" in fixture.inputs:
        yield from _qwen_tower(fixture)
    else:
        raise Unhandled(f"inputs {sorted(fixture.inputs)} belong to no known FlowCut fixture")


def _counts(attention: Tensor, options: dict, epsilon: float | None = None) -> Tensor:
    alive = torch.full((len(attention),), float(attention.shape[1]))
    ratio = flowcut.entropy_ratio(attention, epsilon=epsilon)
    return flowcut.prune_count(ratio, alive, options["target_num"], options["remaining_prune_layers"])


def _scores(fixture: Fixture) -> Iterator[Comparison]:
    inputs, out = fixture.inputs, fixture.outputs
    flow = Flow(inputs["cls_attention"], inputs["semantic_attention"], inputs["value_mean_heads"])
    yield relative("score", flowcut.importance(flow), out["score"], 1e-5, 1e-4)
    counts = _counts(flow.attention, fixture.kwargs)
    if "prune_num_each" in out:
        yield exact("prune_num_each", counts.round().long(), out["prune_num_each"])
    if "prune_num_batch" in out:
        yield exact("prune_num_batch", counts.max().round().long(), out["prune_num_batch"])


def _qwen_scores(fixture: Fixture) -> Iterator[Comparison]:
    """The official Qwen functions skip the renormalisation and take ln(a + 1e-7)."""
    relation, semantic = fixture.inputs["relation"], fixture.inputs["semantic"]
    norm = fixture.inputs["value"].abs().sum(-1)
    yield relative("score_vit", relation * norm, fixture.outputs["score_vit"], 1e-5, 1e-4)
    yield relative("score_llm", (relation + semantic) * norm, fixture.outputs["score_llm"], 1e-5, 1e-4)
    count = _counts(relation, fixture.kwargs, epsilon=1e-7).round().long()
    yield exact("prune_num", count.reshape(fixture.outputs["prune_num"].shape), fixture.outputs["prune_num"])


def _tower(fixture: Fixture) -> Iterator[Comparison]:
    model, out = clip_tower(fixture.params, fixture.kwargs), fixture.outputs
    recorded = Recorded(FlowCut(keep=fixture.kwargs["target_num_patches"], where="tower", shared_count=True))
    scores: dict[int, Tensor] = {}
    with torch.no_grad(), attach(model, Scores(recorded, scores)) as session:
        tower = model.model.vision_tower(fixture.inputs["pixel_values"], output_hidden_states=True)
        state = session.tower_state
    if state is not None:  # else the target is the whole grid and nothing is dropped
        yield exact("keep_indices", state.index, out["keep_indices"])
        if "tokens_after_layer" in out:
            after = [*state.lengths[1:], state.lengths[-1]]
            yield exact("tokens_after_layer", after, out["tokens_after_layer"])
    for layer, score in scores.items():
        name = f"cumulative_score_after_layer{layer}"
        if name in out:
            yield relative(name, score, out[name], 1e-3, 1e-4)
    if "cls_attention_layer0" in out and recorded.signals:
        yield difference("cls_attention_layer0", recorded.signals[0].attention, out["cls_attention_layer0"], 1e-5)
    yield relative("features", tower.hidden_states[-2][:, 1:], out["features"], 1e-3, 1e-4)


@dataclass(frozen=True)
class Scores:
    """A tower method whose smoothed scores, gathered after each layer's pruning, are kept by layer."""

    method: Intervention
    seen: dict[int, Tensor]

    @property
    def name(self) -> str:
        """The method's own name."""
        return self.method.name

    def plan(self, adapter: Adapter) -> Sequence[Any]:
        """Return the method's tower stages; each notes what it prunes and what its predecessor left."""
        return [
            replace(stage, select=partial(self._select, stage), kept=partial(self._kept, stage))
            for stage in self.method.plan(adapter)
            if isinstance(stage, TowerStage)
        ]

    def _kept(self, stage: TowerStage, memory: dict[str, Any], index: Tensor) -> None:
        stage.kept(memory, index)
        self.seen[stage.after_layer] = memory["score"].clone()

    def _select(self, stage: TowerStage, view: TowerView) -> Tensor | None:
        if "score" in view.memory:
            self.seen[view.layer - 1] = view.memory["score"].clone()
        return stage.select(view)


def _language(fixture: Fixture) -> Iterator[Comparison]:
    options, out = fixture.kwargs, fixture.outputs
    layer = options["prune_layer"]
    method = FlowCut(keep=options["target_num"], where="language", layer=layer)
    prefill = prefill_llama(fixture, options["visual_token_pos"], options["visual_token_num"], method)
    yield exact("keep_indices", [prefill.kept], out["keep_indices"])
    yield exact("kv_lengths", prefill.kv_lengths, out["kv_lengths"])
    yield relative("last_hidden_state", prefill.hidden_states[-1], out["last_hidden_state"], 1e-3, 1e-4)


def _qwen_tower(fixture: Fixture) -> Iterator[Comparison]:
    """Single patches are dropped and the merger joins every four survivors: the official mode."""
    options, out = fixture.kwargs, fixture.outputs
    names = ("depth", "embed_dim", "num_heads", "hidden_size", "mlp_ratio", "patch_size", "temporal_patch_size")
    names += ("spatial_merge_size", "in_channels", "hidden_act")
    config = Qwen2VLVisionConfig(**{n: options[n] for n in names if n in options})
    config._attn_implementation = NAME
    tower = Qwen2VisionTransformerPretrainedModel(config).eval()
    tower.load_state_dict(fixture.params)
    target = options.get("vit_target_patches", 8 * options["target_num"])
    stages = FlowCut(keep=target).tower_stages(config.depth, target, flowcut.mean_query_flow)
    part, hooks = PackedTowerPart(tower, {s.after_layer: s for s in stages}), Hooks()
    part.install(hooks)
    try:
        with torch.no_grad():
            merged = tower(fixture.inputs["patches"], fixture.inputs["grid_thw"]).pooler_output
    finally:
        hooks.remove()
    assert part.state is not None
    for number, step in enumerate(part.state.steps):
        yield exact(f"keep_step{number}", step[0], out[f"keep_step{number}"])
    yield exact("steps", len(part.state.steps), sum(name.startswith("keep_step") for name in out))
    yield exact("tokens_into_block", part.state.tokens, out["tokens_into_block"])
    yield relative("merged", merged, out["merged"], 1e-3, 1e-4)
