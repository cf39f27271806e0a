"""What the tests of methods behind the tower share: watching a run, views made by hand, a tower without CLS."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "lmm"))
import models

from vislm import attach
from vislm.golden import verify_folder
from vislm.golden.checks._encoding import Watched
from vislm.lmm.interventions import ImageView, Selection, TowerRecord

GOLDEN = Path(__file__).parents[1] / "golden"


def watched(model, inputs, method) -> list[tuple[ImageView, Selection]]:
    """Views and selections of one prefill, image by image."""
    spy = Watched(method)
    with torch.no_grad(), attach(model, spy):
        model(**inputs)
    return spy.seen


def joined_view(signals: dict[str, Tensor], features: Tensor) -> ImageView:
    """A view of a family that joins every two patches (K, N, c) behind the tower."""

    def pack(maps: Tensor, newline: float) -> Tensor:
        return maps.unflatten(1, (-1, 2)).mean(2).flatten(0, 1)

    view = ImageView(features, torch.ones(len(features), dtype=torch.bool), 0, 0, {})
    view.tower, view.pack = TowerRecord(signals, None, None), pack
    return view


def siglip(dtype: torch.dtype = torch.float32):
    """LLaVA with a tower without CLS, read behind its last layer."""
    _, text = models.configs()
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-1, vision_feature_select_strategy="full"
    )
    config.image_token_id = models.IMAGE_TOKEN
    return models._finish(LlavaForConditionalGeneration(config), dtype)


def failures(fixture: Path, folder: Path, changed: str | None = None) -> set[str]:
    """Names of the comparisons that fail for a fixture, with the last element of one output changed."""
    with safe_open(fixture, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if changed is not None:
        tensors[changed] = wrong = tensors[changed].clone()
        last = wrong.view(-1)[-1:]
        last.copy_(~last if wrong.dtype == torch.bool else last + (0.1 if wrong.is_floating_point() else 1))
    save_file(tensors, folder / "case.safetensors", metadata)
    (verdict,) = verify_folder(folder)
    assert verdict.comparisons
    return {c.name for c in verdict.comparisons if not c.passed}


def outputs(method: str) -> list[tuple[Path, str]]:
    """Every output of a method's fixtures."""
    pairs = []
    for path in sorted((GOLDEN / method).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            pairs += [(path, key) for key in file.keys() if key.startswith("out.")]  # noqa: SIM118
    return pairs
