"""The untrained model of true sizes, built small."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vislm import FlowCut, attach
from vislm.demo.photograph import PHOTO
from vislm.demo.true_shape import IMAGE_TOKEN, PATCHES, build_llava, fast_dtype, llava_config, photo_inputs
from vislm.errors import UsageError
from vislm.images import load_image

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}


def small(seed: int = 0, dtype: torch.dtype = torch.float32):
    return build_llava(2, seed, dtype, TOWER, DECODER)


def test_the_configuration_is_that_of_llava() -> None:
    config = llava_config(layers=2)
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 24, 336, 14)
    assert (vision.num_attention_heads, vision.intermediate_size) == (16, 4096)
    assert (text.hidden_size, text.num_attention_heads, text.intermediate_size) == (4096, 32, 11008)
    assert (text.vocab_size, text.num_hidden_layers, text.head_dim) == (32064, 2, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_seeded_finite_and_prunable(dtype: torch.dtype) -> None:
    model = small(dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model.lm_head.weight, small(dtype=dtype).lm_head.weight)
    assert not torch.equal(model.lm_head.weight, small(seed=1, dtype=dtype).lm_head.weight)
    inputs = photo_inputs(load_image(PHOTO), dtype)
    with torch.no_grad(), attach(model, FlowCut(keep=64)) as session:
        logits = model(**inputs).logits
    assert bool(logits.isfinite().all())
    assert session.last_run is not None
    assert session.last_run.visual_tokens == [PATCHES]
    assert session.last_run.visual_tokens_kept == [64]


def test_inputs_hold_one_placeholder_per_patch() -> None:
    inputs = photo_inputs(Image.new("RGB", (500, 300)), torch.float32)
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)
    assert int((inputs["input_ids"] == IMAGE_TOKEN).sum()) == PATCHES
    assert inputs["input_ids"].shape == (1, PATCHES + 60)


def test_layers_are_checked() -> None:
    with pytest.raises(UsageError, match="layers=0"):
        build_llava(0)


def test_the_photograph_is_small_and_square() -> None:
    assert PHOTO.stat().st_size < 150_000
    assert load_image(PHOTO).size == (512, 512)


def test_the_fast_dtype_is_one_of_two() -> None:
    assert fast_dtype() in (torch.float32, torch.bfloat16)
