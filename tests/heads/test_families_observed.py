"""A recorder beside a head method changes nothing, and sees the rows that the method leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from family_cases import CASES
from family_eager import Edit, Sample, plain, sample
from running import generate
from torch import Tensor

from vislm.analysis.recorder import Recorder, recorded
from vislm.errors import PlanConflict

STEPS = 6


@dataclass(frozen=True)
class Seen(Sample):
    """Keeps the weights of every run by explicit matrices."""

    runs: list[dict[int, Tensor]] = field(default_factory=list)

    def run(self, inputs: dict[str, Any], edit: Edit = plain, **options: Any) -> Any:
        self.runs.append({})

        def keep(logits: Tensor, mask: Tensor, layer: int) -> Tensor:
            weights = self.runs[-1][layer] = edit(logits, mask, layer)
            return weights

        return super().run(inputs, keep, **options)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("opera", "vhr")])
def test_rows_are_those_of_explicit_matrices(family: str, name: str) -> None:
    own, case = sample(family, 1), CASES[name]
    alone, _, _ = generate(own.model, own.inputs, case.method, max_new_tokens=STEPS)
    for methods in ((case.method, Recorder("last_rows")), (Recorder("last_rows"), case.method)):
        logits, out, run = generate(own.model, own.inputs, *methods, max_new_tokens=STEPS)
        torch.testing.assert_close(logits, alone, atol=1e-6, rtol=1e-5)
    seen = Seen(own.family, own.model, own.inputs)
    assert case.reference is not None
    case.reference(seen, out.sequences[0, own.length : -1])
    whole = next(run for run in seen.runs if run[0].shape[-1] == own.length + STEPS - 1)
    steps = recorded(run).steps
    assert len(steps) == STEPS
    for step, layers in enumerate(steps):
        keys = own.length + step
        for layer, record in layers.items():
            assert record.row is not None
            torch.testing.assert_close(record.row[0], whole[layer][0, :, keys - 1, :keys], atol=2e-5, rtol=1e-4)


def test_vhr_is_seen_through_its_heads() -> None:
    """It leaves the weights alone: what it scales are the heads' outputs, which are recorded before."""
    own, method = sample("llava"), CASES["vhr"].method
    alone, _, run = generate(own.model, own.inputs, method, max_new_tokens=STEPS)
    recorder = Recorder(divergence=True)
    logits, _, both = generate(own.model, own.inputs, method, recorder, max_new_tokens=STEPS)
    assert torch.equal(logits, alone)
    for layer, vhd in run.memory[0]["vhd"].items():
        torch.testing.assert_close(recorded(both).divergence[layer], vhd, atol=1e-6, rtol=1e-5)


def test_a_search_that_takes_tokens_back_is_refused() -> None:
    own = sample("llava")
    with pytest.raises(PlanConflict, match="recorder keeps a record of every token, and opera"):
        generate(own.model, own.inputs, CASES["opera"].method, Recorder())
