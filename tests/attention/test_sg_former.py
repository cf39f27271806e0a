"""SG-Former's attentions against their equations written out pair by pair; any grid; errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate

from vislm.attention import HybridScaleAttention, LepeAttention, SelfGuidedAttention
from vislm.attention.self_guided import RUNS
from vislm.errors import UsageError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return module.eval()


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def weights(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None = None) -> Tensor:
    logits = scale * query @ key.transpose(-1, -2)
    return (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(dim=-1)


def finished(module: nn.Module, x: Tensor, attended: Tensor, grid: tuple[int, int]) -> Tensor:
    local = module.lepe_linear(x)
    prefix, patches = local[:, : module.num_prefix_tokens], local[:, module.num_prefix_tokens :]
    convolved = module.lepe_conv(patches.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
    return module.proj(attended.transpose(1, 2).flatten(2) + torch.cat((prefix, convolved), dim=1))


def hybrid(module: HybridScaleAttention, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Output and significance from both attention matrices."""
    prefix, half = module.num_prefix_tokens, module.num_heads // 2
    patches = x[:, prefix:].transpose(1, 2).unflatten(2, grid)
    room = [max(0, module.sr_ratio - side) for side in grid]
    reduced = module.sr(nn.functional.pad(patches, (0, room[1], 0, room[0])))
    coarse = torch.cat((x[:, :prefix], gelu(module.norm(reduced.flatten(2).transpose(1, 2)))), dim=1)
    k1, v1 = (heads(part, half) for part in module.kv1(coarse).chunk(2, dim=-1))
    a1 = weights(heads(module.q1(x), half), k1, module.scale)
    window = torch.cartesian_prod(*(torch.arange(side) // module.window_size for side in grid)).view(-1, 2)
    allowed = torch.ones(len(window) + prefix, len(window) + prefix, dtype=torch.bool)
    allowed[prefix:, prefix:] = (window[:, None] == window[None]).all(dim=-1)
    k2, v2 = (heads(part, half) for part in module.kv2(x).chunk(2, dim=-1))
    a2 = weights(heads(module.q2(x), half), k2, module.scale, allowed)
    y = finished(module, x, torch.cat((a1 @ v1, a2 @ v2), dim=1), grid)
    coarse_map = a1[:, :, prefix:, prefix:].mean(dim=(1, 2)).unflatten(1, (1, *reduced.shape[2:]))
    inside = allowed[prefix:, prefix:].sum(dim=0)
    local_map = a2[:, :, prefix:, prefix:].mean(dim=1).sum(dim=1) / inside
    return y, interpolate(coarse_map, grid, mode="nearest").flatten(1) + local_map


def merged(module: SelfGuidedAttention, patches: Tensor, significance: Tensor) -> Tensor:
    """The merged tokens, one run at a time."""
    found = []
    for sample, scores in zip(patches, significance, strict=True):
        ranked, runs, start = sample[scores.argsort(stable=True)], [], 0
        parts = RUNS[module.sr_ratio]
        for number, (share, length) in enumerate(parts, start=1):
            end = len(sample) if number == len(parts) else start + len(sample) // share
            linear = getattr(module, f"f{number}")
            for first in range(start, end, length):
                run = ranked[first : min(first + length, end)]
                runs.append((linear.weight[0, : len(run), None] * run).sum(dim=0) + linear.bias)
            start = end
        found.append(torch.stack(runs))
    return torch.stack(found)


GRIDS = [(14, 14, 2), (7, 21, 4), (9, 10, 2), (16, 13, 8), (3, 5, 4), (1, 1, 2)]


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("height", "width", "ratio"), GRIDS)
def test_hybrid_scales_are_both_attentions_side_by_side(height, width, ratio, prefix) -> None:
    module = randomized(HybridScaleAttention(16, 4, ratio, num_prefix_tokens=prefix))
    x = torch.randn(2, prefix + height * width, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours, theirs = module(x, (height, width), significance=True), hybrid(module, x, (height, width))
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-6, rtol=1e-5)
    assert not ours[1].requires_grad
    torch.testing.assert_close(module(x, (height, width)), ours[0])
    leaves, upstream = [x, *module.parameters()], torch.linspace(-1, 1, ours[0].numel()).view_as(ours[0])
    gradients = (torch.autograd.grad(y, leaves, upstream) for y in (ours[0], theirs[0]))
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("ratio", "grid"), [(8, (28, 28)), (4, (14, 14)), (2, (6, 10)), (8, (9, 11)), (4, (3, 5))])
def test_self_guided_keys_are_runs_of_sorted_tokens(ratio, grid, prefix) -> None:
    module = randomized(SelfGuidedAttention(8, 2, ratio, num_prefix_tokens=prefix))
    x = torch.randn(2, prefix + math.prod(grid), 8, generator=torch.Generator().manual_seed(1))
    significance = torch.rand(2, math.prod(grid), generator=torch.Generator().manual_seed(2))
    keys = torch.cat((x[:, :prefix], merged(module, x[:, prefix:], significance)), dim=1)
    (k1, v1), (k2, v2) = (linear(keys).chunk(2, dim=-1) for linear in (module.kv1, module.kv2))
    k, v = (heads(torch.cat(parts, dim=-1), 2) for parts in ((k1, k2), (v1, v2)))
    expected = finished(module, x, weights(heads(module.q(x), 2), k, module.scale) @ v, grid)
    torch.testing.assert_close(module(x, grid, significance), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("ratio", "tokens", "keys"), [(8, 3136, 60), (4, 784, 60), (2, 196, 147)])
def test_numbers_of_merged_tokens_are_the_published_ones(ratio, tokens, keys) -> None:
    module = SelfGuidedAttention(4, 2, ratio)
    assert module.merged(torch.randn(1, tokens, 4), torch.rand(1, tokens)).shape == (1, keys, 4)


def test_tokens_of_equal_significance_keep_their_order() -> None:
    module = randomized(SelfGuidedAttention(4, 2, 2))
    x = torch.randn(1, 8, 4)
    torch.testing.assert_close(module.merged(x, torch.zeros(1, 8)), module.merged(x, torch.arange(8.0)[None]))


@given(rows=st.integers(1, 17), columns=st.integers(1, 17), ratio=st.sampled_from([2, 4, 8]), prefix=st.integers(0, 2))
def test_a_batch_is_its_samples_though_each_sorts_differently(rows, columns, ratio, prefix) -> None:
    grid = (rows, columns)
    first = randomized(HybridScaleAttention(8, 2, ratio, num_prefix_tokens=prefix))
    second = randomized(SelfGuidedAttention(8, 2, ratio, num_prefix_tokens=prefix), seed=1)
    x = torch.randn(3, prefix + rows * columns, 8, generator=torch.Generator().manual_seed(rows * 17 + columns))
    y, significance = first(x, grid, significance=True)
    assert y.shape == x.shape
    assert bool((significance >= 0).all())
    alone = torch.cat([second(s[None], grid, own[None]) for s, own in zip(x, significance, strict=True)])
    torch.testing.assert_close(second(x, grid, significance), alone, atol=1e-5, rtol=1e-5)
    alone = torch.cat([first(sample[None], grid) for sample in x])
    torch.testing.assert_close(y, alone, atol=1e-5, rtol=1e-5)


def test_lepe_attention_is_full_attention_and_a_convolution() -> None:
    module = randomized(LepeAttention(12, 3, num_prefix_tokens=1, qkv_bias=False, qk_scale=0.7))
    x = torch.randn(2, 31, 12)
    k, v = (heads(part, 3) for part in module.kv(x).chunk(2, dim=-1))
    expected = finished(module, x, weights(heads(module.q(x), 3), k, 0.7) @ v, (5, 6))
    torch.testing.assert_close(module(x, (5, 6)), expected, atol=1e-5, rtol=1e-5)
    assert {name for name, _ in module.named_parameters() if name.startswith(("q.", "kv."))} == {
        "q.weight",
        "kv.weight",
    }


def test_the_map_stays_in_float32() -> None:
    module = randomized(HybridScaleAttention(16, 4, 2))
    x = torch.randn(1, 98, 16)
    y, significance = module(x, (7, 14), significance=True)
    half, rough = module.bfloat16()(x.bfloat16(), (7, 14), significance=True)
    assert (half.dtype, rough.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(half.float(), y, atol=1e-1, rtol=5e-2)
    torch.testing.assert_close(rough, significance, atol=1e-2, rtol=5e-2)


def test_multiply_adds_are_far_below_full_attention() -> None:
    grid, dim = (56, 56), 64
    projections = 2 * 3136 * dim**2 + 9 * 3136 * dim
    guided = SelfGuidedAttention(dim, 2, 8).macs(grid) - projections
    assert guided == 3136 * dim + (3136 + 120) * dim**2 + 2 * 3136 * 60 * dim
    assert LepeAttention(dim, 2).macs(grid) - projections == 3 * 3136 * dim**2 + 2 * 3136**2 * dim


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (HybridScaleAttention, {"num_heads": 1}, "num_heads=1.*even number of heads"),
        (HybridScaleAttention, {"sr_ratio": 0}, "sr_ratio=0"),
        (HybridScaleAttention, {"window_size": 0}, "window_size=0"),
        (SelfGuidedAttention, {"sr_ratio": 3}, r"sr_ratio=3; expected .* \[8, 4, 2\]"),
        (SelfGuidedAttention, {"num_heads": 1}, "even number of heads"),
        (LepeAttention, {"num_heads": 3}, "dim=16 is not a multiple of num_heads=3"),
    ],
)
def test_wrong_options(cls, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        cls(16, **{"num_heads": 2, **options})


@pytest.mark.parametrize(
    ("significance", "message"),
    [(None, r"significance is None, expected \(B, H W\) = \(2, 20\)"), (torch.rand(1, 20), r"of shape \(1, 20\)")],
)
def test_self_guided_attention_needs_a_map(significance, message) -> None:
    with pytest.raises(UsageError, match=message):
        SelfGuidedAttention(8, 2, 2)(torch.randn(2, 20, 8), (4, 5), significance)


def test_wrong_grids() -> None:
    for module in (LepeAttention(8, 2), HybridScaleAttention(8, 2), SelfGuidedAttention(8, 2)):
        with pytest.raises(UsageError, match=r"expected \(B, N, C\) = \(B, 16, 8\)"):
            module(torch.zeros(1, 15, 8), (4, 4))
