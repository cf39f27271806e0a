"""Every attention keeps the promises of all; the check notices one that does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vislm.attention import HybridScaleAttention, SelfGuidedAttention, attention_class, attention_names
from vislm.attention.contract import check_attention

pytestmark = pytest.mark.filterwarnings("ignore:.* agents on a map of:UserWarning")

OPTIONS = {
    "agent": {"agent_num": 9, "table_size": 6},
    "agent_cswin": {"agent_num": 4, "table_size": 6, "split_size": 3},
    "cswin": {"split_size": 3},
    "halo": {"num_heads": 2, "block_size": 3, "halo_size": 1, "mask_padding": True},
    "hybrid_scale": {"sr_ratio": 2, "window_size": 3},
    "large_kernel": {"kernel_size": 9},
    "moh_aggregated": {"sr_ratio": 2},
    "neighborhood": {"window_size": 5, "rel_pos_bias": True},
    "sigmoid": {"bias": "-log_n_current"},
    "super_token": {"stoken_size": 3},
    "window": {"window_size": 3, "shifted": True},
}


class Guided(nn.Module):
    """A self-guided attention behind the hybrid-scale one that tells it what matters."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, num_prefix_tokens: int = 0) -> None:
        super().__init__()
        self.first = HybridScaleAttention(dim, num_heads, 2, window_size=4, num_prefix_tokens=num_prefix_tokens)
        self.second = SelfGuidedAttention(dim, num_heads, sr_ratio, num_prefix_tokens=num_prefix_tokens)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        mixed, significance = self.first(x, grid, significance=True)
        # Kept apart where half precision might sort alike tokens in another order.
        fixed = torch.arange(significance.shape[1], dtype=torch.float32).expand_as(significance)
        return mixed + self.second(x, grid, fixed)

    def macs(self, grid: tuple[int, int]) -> int:
        return self.first.macs(grid) + self.second.macs(grid)


@pytest.mark.parametrize("name", sorted(set(attention_names()) - {"self_guided"}))
def test_every_attention_keeps_its_promises(name) -> None:
    check_attention(attention_class(name), **OPTIONS.get(name, {}))


@pytest.mark.parametrize("sr_ratio", [2, 4, 8])
def test_self_guided_attention_too(sr_ratio) -> None:
    check_attention(Guided, sr_ratio=sr_ratio)


class Faulty(nn.Module):
    """Breaks one promise."""

    def __init__(self, dim: int, num_heads: int, fault: str) -> None:
        super().__init__()
        self.fault, self.proj = fault, nn.Linear(dim, dim)
        if fault == "unused":
            self.spare = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        y = self.proj(x)
        match self.fault:
            case "batch":
                return y + x.mean()
            case "shape":
                return y[:, 1:]
            case "grid":
                return y + x.view(len(x), 8, 8, -1).flatten(1, 2)
            case "random":
                return y + torch.rand(())
            case "dtype":
                return y.float()
            case "infinite":
                return y + (x - x.detach()).sqrt()
        return y

    def macs(self, grid: tuple[int, int]) -> float:
        return 1.5 if self.fault == "macs" else grid[0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("batch", "samples alone"),
        ("shape", "expected"),
        ("grid", "must match the size"),
        ("random", "samples alone|second call"),
        ("unused", "no gradient reaches spare"),
        ("dtype", "returns torch.float32"),
        ("infinite", "not finite"),
        ("macs", "macs of 8 x 8"),
    ],
)
def test_a_broken_promise_is_noticed(fault, message) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_attention(Faulty, fault=fault)


def test_what_breaks_none_passes() -> None:
    check_attention(Faulty, fault="none")
