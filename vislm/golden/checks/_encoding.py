"""Encoding a fixture's images under a prompt method, in a real LLaVA model without a projector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vislm.golden.fixtures import Fixture
from vislm.lmm.adapters import Adapter
from vislm.lmm.interventions import ImageView, Intervention, PromptStage, Selection
from vislm.lmm.session import attach


@dataclass(frozen=True)
class Watched:
    """A prompt method whose views and selections are kept, image by image."""

    method: Intervention
    seen: list[tuple[ImageView, Selection]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The method's own name."""
        return self.method.name

    def plan(self, adapter: Adapter) -> Sequence[Any]:
        """Return the method's prompt stages, watched."""
        return [
            replace(stage, select=partial(self._select, stage))
            for stage in self.method.plan(adapter)
            if isinstance(stage, PromptStage)
        ]

    def _select(self, stage: PromptStage, view: ImageView) -> Tensor | Selection:
        chosen = stage.select(view)
        if isinstance(chosen, Tensor):
            chosen = Selection(chosen, view.features[chosen])
        self.seen.append((view, chosen))
        return chosen


def encode(fixture: Fixture, method: Intervention) -> list[tuple[ImageView, Selection]]:
    """Return what ``method`` saw and chose of each of ``in.pixel_values`` (B, 3, H, W).

    The tower has the fixture's CLIP weights; tokens are its features as they are, since the projector is the identity.
    """
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("image_size", "patch_size", "hidden_act", "layer_norm_eps")
    vision = CLIPVisionConfig(**{n: fixture.kwargs[n] for n in names if n in fixture.kwargs})
    text = LlamaConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        vocab_size=8,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text)
    config.image_token_id = text.vocab_size - 1
    model = LlavaForConditionalGeneration(config)
    model.model.set_submodule("multi_modal_projector", nn.Identity())
    model.model.vision_tower.load_state_dict({k.removeprefix("vision_model."): v for k, v in fixture.params.items()})
    model.set_attn_implementation("sdpa")
    pixels, watched = fixture.inputs["pixel_values"], Watched(method)
    patches = (fixture.kwargs["image_size"] // fixture.kwargs["patch_size"]) ** 2
    row = torch.tensor([1, *[config.image_token_id] * patches, 2])
    with torch.no_grad(), attach(model.eval(), watched):
        model(input_ids=row.expand(len(pixels), -1), pixel_values=pixels)
    return watched.seen
