"""Convolutions with gaps, phase by phase: the same numbers and gradients as PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vislm.attention.dilated import dilated


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.sampled_from([1, 3, 7]),
    gaps=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    batch=st.integers(1, 2),
)
def test_equals_the_convolution(kernel, gaps, size, batch) -> None:
    torch.manual_seed(0)
    padding = tuple(kernel // 2 * gap for gap in gaps)
    conv = nn.Conv2d(5, 5, kernel, padding=padding, groups=5, dilation=gaps).double()
    x = torch.randn(batch, 5, *size, dtype=torch.float64, requires_grad=True)
    expected, ours = conv(x), dilated(conv, x)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(expected)
    leaves = (x, *conv.parameters())
    pairs = zip(*(torch.autograd.grad(y, leaves, upstream) for y in (ours, expected)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("batch", [1, 3])
def test_float32_maps_of_van(batch) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 8, 7, padding=9, groups=8, dilation=3), torch.randn(batch, 8, 14, 16)
    torch.testing.assert_close(dilated(conv, x), conv(x), atol=1e-6, rtol=1e-6)
