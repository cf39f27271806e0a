"""What a forward pass keeps in memory."""

from __future__ import annotations

import weakref

import pytest
import torch

import vislm


@pytest.mark.parametrize("name", ["agent_deit_tiny", "van_b0"])
def test_only_the_last_levels_output_stays(name) -> None:
    model = vislm.create_model(name).eval()
    outputs: list[weakref.ref] = []

    def remember(module, inputs, output) -> None:
        outputs.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    for level in model.levels:
        level.register_forward_hook(remember)
    alive = []
    model.norm.register_forward_pre_hook(lambda *_: alive.append([reference() is not None for reference in outputs]))
    with torch.no_grad():
        model(torch.randn(1, 3, 112, 112))
    ((*before, last),) = alive
    assert last
    assert not any(before[:-1])  # the one before may still be the last one's input
