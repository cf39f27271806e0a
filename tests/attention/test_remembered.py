"""What inference keeps from one pass to the next: never anything but what it would compute."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from vislm.attention import remembered
from vislm.attention.agent import AgentAttention
from vislm.attention.moh_aggregated import MohAggregatedAttention
from vislm.attention.moh_cosine import MohCosineAttention
from vislm.attention.remembered import Remembered

GRIDS = ((8, 8), (6, 10))


class Counted:
    """A function that counts its calls."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.calls = weight, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.weight * 2


def test_computes_once_per_key_and_value() -> None:
    weight = torch.ones(3)
    kept, function = Remembered(), Counted(weight)
    with torch.no_grad():
        for expected, key in ((1, "a"), (1, "a"), (2, "b"), (2, "b")):
            assert torch.equal(kept(key, [weight], function), torch.full((3,), 2.0))
            assert function.calls == expected
        weight.data.mul_(3)  # unseen by version counters
        assert torch.equal(kept("b", [weight], function), torch.full((3,), 6.0))


def test_gradients_large_results_and_copies_start_anew(monkeypatch) -> None:
    weight = torch.ones(3, requires_grad=True)
    kept, function = Remembered(), Counted(weight)
    for _ in range(2):
        kept("a", [weight], function).sum().backward()
    assert function.calls == 2
    with torch.no_grad():
        kept("a", [weight], function)
        assert copy.deepcopy(kept)._last is None
        assert pickle.loads(pickle.dumps(kept))._last is None
        kept("a", [weight], function)
        assert function.calls == 3
        monkeypatch.setattr(remembered, "LIMIT", 2)
        kept("b", [weight], function)
        kept("b", [weight], function)
    assert function.calls == 5


@pytest.mark.parametrize(
    "build",
    [
        lambda: AgentAttention(16, 4, agent_num=9, table_size=8, num_prefix_tokens=0),
        lambda: MohAggregatedAttention(16, 4, sr_ratio=2, pretrained_grid=8),
        lambda: MohCosineAttention(16, 4, pretrained_grid=8),
    ],
)
def test_attention_without_gradients_equals_attention_with_them(build) -> None:
    torch.manual_seed(0)
    module: nn.Module = build().eval()
    for step in range(3):
        for grid in GRIDS:
            x = torch.randn(2, grid[0] * grid[1], 16)
            expected = module(x, grid).detach()
            with torch.no_grad():
                for _ in range(2):
                    torch.testing.assert_close(module(x, grid), expected, atol=1e-6, rtol=1e-5)
        for parameter in module.parameters():
            parameter.data.add_(0.1 * (step + 1))


def test_what_inference_mode_kept_does_not_hinder_training() -> None:
    module, x = AgentAttention(16, 4, agent_num=9, table_size=8), torch.randn(1, 48, 16)
    with torch.inference_mode():
        module(x, (6, 8))
    module(x, (6, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
