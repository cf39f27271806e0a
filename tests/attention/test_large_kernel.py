"""Large-kernel attention as a module: against sums over shifted maps, on small maps, with prefix tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from vislm.attention import LargeKernelAttention
from vislm.attention.large_kernel import LargeKernelGate
from vislm.errors import UsageError


def shifted_sum(conv: nn.Conv2d, x: Tensor, step: int) -> Tensor:
    """Return a depthwise convolution as the sum of shifted maps, ``step`` apart, zeros outside."""
    height, width = x.shape[2:]
    size = conv.weight.shape[-1]
    reach = size // 2 * step
    margin = pad(x, (reach,) * 4)
    total = conv.bias[:, None, None].expand_as(x)
    for row in range(size):
        for column in range(size):
            window = margin[:, :, row * step : row * step + height, column * step : column * step + width]
            total = total + conv.weight[:, 0, row, column, None, None] * window
    return total


def slow(module: LargeKernelAttention, x: Tensor, grid: tuple[int, int], dilation: int) -> Tensor:
    """Return the output for tokens without a prefix."""
    gate, dim = module.spatial_gating_unit, module.dim

    def mixed(conv: nn.Conv2d, tokens: Tensor) -> Tensor:
        return tokens @ conv.weight.view(dim, dim).T + conv.bias

    inner = gelu(mixed(module.proj_1, x))
    field = inner.transpose(1, 2).unflatten(2, grid)
    field = shifted_sum(gate.conv_spatial, shifted_sum(gate.conv0, field, 1), dilation)
    return x + mixed(module.proj_2, inner * mixed(gate.conv1, field.flatten(2).transpose(1, 2)))


@pytest.mark.parametrize(("kernel", "dilation"), [(21, 3), (6, 2), (5, 1), (9, 3), (35, 5)])
@pytest.mark.parametrize("grid", [(12, 9), (3, 14), (1, 1)])
def test_equals_sums_of_shifted_maps_with_gradients(kernel, dilation, grid) -> None:
    torch.manual_seed(0)
    module = LargeKernelAttention(4, kernel_size=kernel, dilation=dilation).double()
    x = torch.randn(2, math.prod(grid), 4, dtype=torch.float64, requires_grad=True)
    ours, theirs = module(x, grid), slow(module, x, grid, dilation)
    torch.testing.assert_close(ours, theirs)
    leaves, upstream = [x, *module.parameters()], torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, other)
        assert mine.abs().sum() > 0


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(1, 30), st.integers(1, 30)), st.integers(0, 3))
def test_prefix_tokens_pass_and_a_batch_is_its_samples(grid, prefix) -> None:
    torch.manual_seed(0)
    module = LargeKernelAttention(4, 2, num_prefix_tokens=prefix)
    x = torch.randn(2, prefix + math.prod(grid), 4)
    out = module(x, grid)
    assert torch.equal(out[:, :prefix], x[:, :prefix])
    torch.testing.assert_close(out[1:, prefix:], slow(module, x[1:, prefix:], grid, 3), atol=1e-5, rtol=1e-5)


def test_a_token_sees_as_far_as_the_two_convolutions_reach() -> None:
    torch.manual_seed(0)
    gate = LargeKernelGate(2).double()
    x = torch.randn(1, 2, 31, 31, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gate(x)[0, 0, 15, 15], [x])
    seen = gradient[0].abs().sum(0).nonzero() - 15
    assert seen.abs().amax(0).tolist() == [11, 11]  # 5x5, then 7x7 with gaps of 3: the published 21 and its rim
    assert len(seen) == 23 * 23


def test_bfloat16() -> None:
    torch.manual_seed(0)
    module = LargeKernelAttention(8)
    x = torch.randn(1, 35, 8)
    half = module.bfloat16()(x.bfloat16(), (5, 7))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), module.float()(x, (5, 7)), atol=3e-2, rtol=3e-2)


def test_macs_are_the_parameters_without_biases_for_each_token() -> None:
    assert LargeKernelAttention(16, num_prefix_tokens=3).macs((7, 5)) == 35 * (3 * 256 + (25 + 49) * 16)


def test_bad_inputs() -> None:
    with pytest.raises(UsageError, match="= 10, expected an odd number"):
        LargeKernelAttention(4, kernel_size=20, dilation=2)
    with pytest.raises(UsageError, match="dilation=0"):
        LargeKernelAttention(4, dilation=0)
    with pytest.raises(UsageError, match="num_prefix_tokens"):
        LargeKernelAttention(4)(torch.zeros(1, 65, 4), (8, 8))
