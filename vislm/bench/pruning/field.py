"""FastV as the field runs it: eager attention that returns the maps of every layer, and a prompt cut by what they say.

It is the measured opponent and no part of the package: attention is computed twice as large as needed in float32, and
the N x N maps of all heads and layers are kept until the forward ends.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from vislm.bench.pruning.model import Subject
from vislm.lmm.choosing.tokens import token_count
from vislm.lmm.hooks import Hooks, named_arguments

LAYER = 2
"""Tokens are dropped before this decoder layer."""


def map_bytes(subject: Subject, columns: int) -> int:
    """Return the size of all attention maps of a prompt, those of the vision tower included."""
    text, vision = subject.model.config.text_config, subject.model.config.vision_config
    size = subject.model.dtype.itemsize
    patches = subject.adapter.tower_segments({"pixel_values": subject.inputs["pixel_values"].flatten(0, -4)})
    tower = sum(n * n for layer in patches for n in layer) * vision.num_attention_heads
    return size * (columns**2 * text.num_attention_heads * text.num_hidden_layers + tower)


def field_seconds(subject: Subject, keep: float | None) -> float:
    """Return the wall time from pixels to the first word with maps, and with FastV's cut if ``keep`` is given."""
    model, adapter = subject.model, subject.adapter
    parts = ("text_config", "vision_config")
    before = {part: getattr(model.config, part)._attn_implementation for part in parts}
    model.set_attn_implementation(dict.fromkeys(parts, "eager"))
    hooks = Hooks()
    if keep is not None:
        _Cut(subject, keep).install(hooks, adapter.layers)
    try:
        started = time.perf_counter()
        with torch.no_grad():
            model(**subject.inputs, output_attentions=True, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - started
    finally:
        hooks.remove()
        model.set_attn_implementation(before)


class _Cut:
    def __init__(self, subject: Subject, keep: float) -> None:
        visual = subject.inputs["input_ids"][0] == subject.model.config.image_token_id
        self.visual = visual.nonzero().flatten()
        self.text = (~visual).nonzero().flatten()
        self.count = token_count(keep, len(self.visual))
        self.index: Tensor | None = None
        self.weights: Tensor | None = None

    def install(self, hooks: Hooks, layers: list[nn.Module]) -> None:
        hooks.after(layers[LAYER - 1].get_submodule("self_attn"), self._remember)
        for number, layer in enumerate(layers[LAYER:], start=LAYER):
            hooks.before(layer, lambda module, args, kwargs, n=number: self._shorten(module, n, args, kwargs))

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self.weights = output[1]

    def _shorten(self, module: nn.Module, number: int, args: tuple, kwargs: dict[str, Any]) -> tuple:
        arguments = named_arguments(module, args, kwargs)
        hidden = arguments.pop("hidden_states")
        if number == LAYER:
            assert self.weights is not None
            scores = self.weights[0, :, -1].mean(0)[self.visual]
            best = self.visual[scores.topk(self.count).indices]
            self.index = torch.cat([self.text, best]).sort().values
            hidden = hidden[:, self.index]
        mask = arguments.get("attention_mask")
        if mask is not None:
            arguments["attention_mask"] = mask[:, :, self.index][..., self.index]
        arguments["position_embeddings"] = tuple(part[:, self.index] for part in arguments["position_embeddings"])
        if arguments.get("position_ids") is not None:
            arguments["position_ids"] = arguments["position_ids"][:, self.index]
        return (hidden,), arguments
