"""Every head method on every family: a left-padded batch gives what its samples give alone."""

from __future__ import annotations

import functools
from typing import Any

import families
import pytest
import torch
from families import FAMILIES
from family_cases import CASES
from family_eager import built
from running import generate
from torch import Tensor

from vislm import FlowCut
from vislm.errors import UsageError
from vislm.token_pruning.divprune import DivPrune


@functools.cache
def mixed(family: str) -> tuple[dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
    """One image; two images of other shapes; none."""
    picture = FAMILIES[family].picture
    prompts: list[Any] = [([picture(0, 0)], [7, 8, 9]), ([picture(1, 1), picture(2, 2)], [7]), ([], [9, 10, 11])]
    return families.inputs(family, *prompts), tuple(families.inputs(family, prompt) for prompt in prompts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "opera"])
def test_a_batch_gives_what_its_samples_give_alone(family: str, name: str) -> None:
    model, (batch, singles), method = built(family), mixed(family), CASES[name].method
    together, out, _ = generate(model, batch, method, max_new_tokens=3)
    for row, single in enumerate(singles):
        logits, alone, _ = generate(model, single, method, max_new_tokens=3)
        assert torch.equal(out.sequences[row, -3:], alone.sequences[0, -3:])
        assert torch.equal(together[:, row].isneginf(), logits[:, 0].isneginf())
        torch.testing.assert_close(together[:, row], logits[:, 0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", ["act", "imbalanced", "pai", "vaf", "var", "vhr", "zerotuning"])
def test_a_padded_batch_with_a_static_cache(family: str, name: str) -> None:
    """Its masks are made beforehand, with four dimensions or one for each type of layer."""
    model, (batch, _), method = built(family), mixed(family), CASES[name].method
    dynamic, _, _ = generate(model, batch, method, max_new_tokens=3)
    static, _, _ = generate(model, batch, method, max_new_tokens=3, cache_implementation="static")
    assert torch.equal(dynamic.isneginf(), static.isneginf())
    torch.testing.assert_close(static, dynamic, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_a_pruner_with_a_static_cache_is_refused(family: str) -> None:
    model, (batch, _) = built(family), mixed(family)
    for pruner in (FlowCut(keep=4, layer=2), DivPrune(keep=4)):
        with pytest.raises(UsageError, match="needs a dynamic cache"):
            generate(model, batch, pruner, max_new_tokens=2, cache_implementation="static")
