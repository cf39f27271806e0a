"""Building real transformers models around a fixture's weights, so that the session itself is what gets checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vislm.golden.fixtures import Fixture
from vislm.lmm.adapters import Adapter
from vislm.lmm.decoder.attention import AttentionCall
from vislm.lmm.interventions import Intervention, LanguageStage, TowerStage
from vislm.lmm.run import Run
from vislm.lmm.session import attach

TEXT_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def clip_tower(params: dict[str, Tensor], kwargs: dict[str, Any]) -> LlavaForConditionalGeneration:
    """Return a LLaVA model whose tower has the fixture's CLIP weights; its language model is a small random one."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("image_size", "patch_size", "hidden_act", "layer_norm_eps")
    vision = CLIPVisionConfig(**{n: kwargs[n] for n in names if n in kwargs})
    model = _llava(vision, _text(width=8))
    state = {k.removeprefix("vision_model."): v for k, v in params.items()}
    model.model.vision_tower.load_state_dict(state)
    return model.eval()


def llama(
    params: dict[str, Tensor], kwargs: dict[str, Any], text_embeddings: Tensor, visual_tokens: int
) -> LlavaForConditionalGeneration:
    """Return a LLaVA model whose language model has the fixture's weights, for images of about ``visual_tokens``.

    Token i of the vocabulary embeds as ``text_embeddings[i]`` (V, C); the image placeholder is the last token.
    """
    rows, side = len(text_embeddings), 2 * math.ceil(visual_tokens**0.5)  # room for any budget
    text = LlamaConfig(
        **{n: kwargs[n] for n in (*TEXT_KEYS, "rms_norm_eps", "hidden_act", "head_dim") if n in kwargs},
        rope_parameters={"rope_type": "default", "rope_theta": kwargs.get("rope_theta", 10000.0)},
        vocab_size=rows + 1,
        max_position_embeddings=4096,
        pad_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=side, patch_size=1
    )
    model = _llava(vision, text)
    decoder = model.model.language_model
    state = {k.removeprefix("model."): v for k, v in params.items() if "embed_tokens" not in k and "lm_head" not in k}
    table = torch.cat([text_embeddings, torch.zeros(1, text.hidden_size)])
    decoder.load_state_dict({**state, "embed_tokens.weight": table})
    return model.eval()


def _text(width: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8, pad_token_id=0
    )


def _llava(vision: CLIPVisionConfig, text: LlamaConfig) -> LlavaForConditionalGeneration:
    config = LlavaConfig(vision_config=vision, text_config=text)
    config.image_token_id = text.vocab_size - 1
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation("sdpa")
    return model


@dataclass(frozen=True)
class Recorded:
    """A method whose stages' signals are kept for inspection."""

    method: Intervention
    signals: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The method's own name."""
        return self.method.name

    def plan(self, adapter: Adapter) -> Sequence[Any]:
        """Return the method's stages with recording signals."""
        return [self._recording(stage) for stage in self.method.plan(adapter)]

    def _recording(self, stage: Any) -> Any:
        if not isinstance(stage, (LanguageStage, TowerStage)):
            return stage

        def signal(call: AttentionCall) -> Any:
            self.signals.append(stage.signal(call))
            return self.signals[-1]

        return replace(stage, signal=signal)


@dataclass(frozen=True)
class Prefill:
    """What a prefill under a method gave."""

    hidden_states: Sequence[Tensor]
    run: Run
    signals: list[Any]
    kv_lengths: list[int]
    kept: list[int]
    """Visual tokens left at the end."""


def prefill_llama(fixture: Fixture, start: int, count: int, method: Intervention) -> Prefill:
    """Run a fixture's ``inputs_embeds`` (1, S, C), visual in [start, start + count), through a real LLaVA model."""
    embeds = fixture.inputs["inputs_embeds"]
    text = torch.cat([embeds[0, :start], embeds[0, start + count :]])
    model = llama(fixture.params, fixture.kwargs, text, count)
    ids = torch.arange(len(text))
    ids = torch.cat([ids[:start], torch.full((count,), len(text)), ids[start:]]).unsqueeze(0)
    images = {"image": BaseModelOutputWithPooling(pooler_output=[embeds[0, start : start + count]])}  # pyright: ignore[reportArgumentType]
    recorded = Recorded(method)
    with torch.no_grad(), attach(model, recorded) as session:
        out = model(input_ids=ids, mm_encoder_outputs=images, use_cache=True, output_hidden_states=True)
        run = session.last_run
    assert run is not None
    kept = run.stages[-1].index[0] if run.stages else list(range(count))
    return Prefill(out.hidden_states, run, recorded.signals, run.layer_tokens, kept)
