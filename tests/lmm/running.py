"""Running tiny models under methods: what the session tests share."""

from __future__ import annotations

from dataclasses import dataclass

import models
import pytest
import torch
from torch import Tensor

from vislm import VHR, FastV, FlowCut, RandomPruning, attach

GENERATE = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6}


def generate(model, inputs, *interventions, **options):
    with attach(model, *interventions) as session:
        out = model.generate(**inputs, **{**GENERATE, **options})
    return torch.stack(out.logits), out, session.last_run


def one_image(family: str, seed: int = 0, words: tuple[int, ...] = (7, 8, 9), dtype=torch.float32):
    """A prompt with one image; for LLaVA-NeXT one of 64 x 48 pixels: 2 x 2 tiles, unpadded, with newlines."""
    if family == "llava":
        return {"input_ids": models.prompt(*words), "pixel_values": models.pixels(1, seed, dtype)}
    tiles = torch.randn(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tokens = 16 + 8 * (6 + 1)  # base view; 8 rows of 6 patches and a newline
    return {
        "input_ids": models.prompt(*words, tokens=tokens),
        "pixel_values": tiles,
        "image_sizes": torch.tensor([[64, 48]]),
    }


FAMILIES = {"llava": models.llava, "llava_next": models.llava_next}


families = pytest.mark.parametrize("family", FAMILIES)


@dataclass(frozen=True)
class KeepGiven:
    """Keeps chosen tokens of every image before the language model."""

    keep: tuple[int, ...]
    positions: str = "original"
    name = "given"

    def plan(self, adapter):
        from vislm.lmm.interventions import PromptStage

        return [PromptStage(self.select, self.positions)]

    def select(self, view) -> Tensor:
        chosen = torch.zeros_like(view.candidates)
        chosen[list(self.keep)] = True
        return chosen


METHODS = {
    "nothing": (),
    "random": (RandomPruning(keep=5),),
    "flowcut": (FlowCut(keep=5, tower_keep=6),),
    "flowcut-both": (FlowCut(keep=5, where="both", tower_keep=8),),
    "fastv": (FastV(keep=5),),
    "fastv-contiguous": (FastV(keep=5, positions="contiguous"),),
    "vhr": (VHR(alpha=2.0),),
    "flowcut+vhr": (FlowCut(keep=5, tower_keep=6), VHR(alpha=2.0)),
    "flowcut+fastv+vhr": (FlowCut(keep=8, where="tower"), FastV(keep=4), VHR(alpha=2.0, text_stream="image_only")),
}


def mixed_batch():
    """Left padding; one image, two images, none."""
    prompts = [models.prompt(7, 8, 9), models.prompt(7, images=2), torch.tensor([[1, 5, 6, 9, 10, 11]])]
    images = [models.pixels(1, 0), models.pixels(2, 1), None]
    batch = {**models.left_pad(*prompts), "pixel_values": torch.cat([i for i in images if i is not None])}
    singles = [
        {"input_ids": p, **({} if i is None else {"pixel_values": i})} for p, i in zip(prompts, images, strict=True)
    ]
    return batch, singles


def hook_count(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def implementations(model) -> tuple[str, str]:
    return model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation
