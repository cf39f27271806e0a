"""Tiny models of every family by explicit attention matrices, without the session and without a cache.

One forward of a prompt and its answer gives the logits of every step, as long as an edit of a row looks at no later
key of the answer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import families
import torch
from families import FAMILIES, IMAGE, VIDEO
from running import GENERATE
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

STEPS = 8
"""Decode steps that are compared, behind the prefill."""

Edit = Callable[[Tensor, Tensor, int], Tensor]
"""Gets logits (B, H, T, T) before masking, the additive mask (B, 1, T, T) and the layer; returns weights."""

_EDITS: dict[nn.Module, Callable[[Tensor, Tensor], Tensor]] = {}


def plain(logits: Tensor, mask: Tensor | float, layer: int = 0) -> Tensor:
    return (logits + mask).softmax(-1)


def _explicit(module, query, key, value, attention_mask, scaling, **kwargs):
    share = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(share, 1).transpose(2, 3) * scaling
    weights = _EDITS.get(module, plain)(logits, 0.0 if attention_mask is None else attention_mask)
    return (weights @ value.repeat_interleave(share, 1)).transpose(1, 2).contiguous(), weights


AttentionInterface.register("explicit", _explicit)
AttentionMaskInterface.register("explicit", eager_mask)


@contextlib.contextmanager
def explicit(model: Any, config: str, edits: dict[nn.Module, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[None]:
    """Let one half of the model ("text_config", "vision_config") attend by explicit matrices."""
    before = getattr(model.config, config)._attn_implementation
    model.set_attn_implementation({config: "explicit"})
    _EDITS.update(edits)
    try:
        yield
    finally:
        _EDITS.clear()
        model.set_attn_implementation({config: before})


def language_model(model: Any) -> Any:
    inner = model.model
    return inner.text_model if hasattr(inner, "text_model") else inner.language_model


@functools.cache
def built(family: str) -> Any:
    """A tiny model that never writes a placeholder or marker, which a run without cache would take for an image."""
    model = families.build(family)
    head = model.lm_head.weight.detach().clone()
    head[families.TILE :] = 0.0
    model.lm_head.weight = nn.Parameter(head)
    return model


@dataclass(frozen=True)
class Sample:
    """One prompt with an image, its model, and what an answer to it is made of."""

    family: str
    model: Any
    inputs: dict[str, Tensor]

    @property
    def length(self) -> int:
        """T, columns of the prompt."""
        return self.inputs["input_ids"].shape[1]

    @property
    def image(self) -> list[int]:
        """Visual columns."""
        ids = self.inputs["input_ids"][0]
        return ((ids == IMAGE) | (ids == VIDEO)).nonzero().flatten().tolist()

    @property
    def end(self) -> int:
        """The first column behind the last visual one."""
        return self.image[-1] + 1

    @property
    def start(self) -> int:
        """The first visual column."""
        return self.image[0]

    def behind(self, answer: Tensor) -> dict[str, Any]:
        """The model's inputs for the prompt and an answer (n,) behind it."""
        ids = torch.cat([self.inputs["input_ids"], answer[None]], 1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in self.inputs:
            kinds = self.inputs["mm_token_type_ids"]
            more["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(answer)))
        return {**self.inputs, **more, "use_cache": False}

    def without_image(self, answer: Tensor) -> dict[str, Any]:
        """The same without the visual columns, markers left in."""
        ids = torch.cat([self.inputs["input_ids"][0], answer])
        ids = ids[(ids != IMAGE) & (ids != VIDEO)][None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def run(self, inputs: dict[str, Any], edit: Edit = plain, **options: Any) -> Any:
        """One forward by explicit matrices; ``edit`` gives the weights of every layer."""
        layers = enumerate(language_model(self.model).layers)
        edits = {layer.self_attn: functools.partial(_of_layer, edit, number) for number, layer in layers}
        with explicit(self.model, "text_config", edits), torch.no_grad():
            return self.model(**inputs, **options)

    def logits(self, answer: Tensor, edit: Edit = plain) -> Tensor:
        """Next-token logits (1 + n, V): behind the prompt, and behind every token of an answer (n,)."""
        return self.run(self.behind(answer), edit).logits[0, self.length - 1 :]

    def greedy(self, tokens: int) -> Tensor:
        """An untouched greedy answer (n,)."""
        call = {**GENERATE, "max_new_tokens": tokens, "return_dict_in_generate": False, "output_logits": False}
        return self.model.generate(**self.inputs, **call)[0, self.length :]


def _of_layer(edit: Edit, number: int, logits: Tensor, mask: Tensor) -> Tensor:
    return edit(logits, mask, number)


@functools.cache
def sample(family: str, shape: int = 0) -> Sample:
    inputs = families.inputs(family, ([FAMILIES[family].picture(shape, 0)], [7, 8, 9]))
    return Sample(family, built(family), inputs)


def check(ours: Tensor, expected: Tensor, what: str) -> None:
    """Compare logits (steps, V), which may be -inf where a method rules words out, within 1e-5 of their size."""
    assert ours.shape == expected.shape, what
    assert torch.equal(ours.isneginf(), expected.isneginf()), what
    finite = expected.isfinite()
    error = (ours - expected)[finite].abs().max() / expected[finite].abs().max()
    assert error <= 1e-5, f"{what}: {error:.2g}"
