"""Tokens seen as maps: views that convolutions take without a copy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vislm.attention.tokens import channels_last, to_map, to_tokens


@pytest.mark.parametrize("batch", [1, 2])
def test_a_map_of_tokens_is_a_view_in_channels_last_order(batch) -> None:
    x = torch.randn(batch, 5 * 7, 6)
    image = to_map(x, (5, 7))
    assert image.data_ptr() == x.data_ptr()
    assert torch.equal(image, x.transpose(1, 2).unflatten(2, (5, 7)))
    assert image.stride() == (5 * 7 * 6, 1, 7 * 6, 6)  # the batch's too: with another one PyTorch copies a single map
    assert torch.equal(to_tokens(image), x)


@pytest.mark.parametrize("batch", [1, 2])
def test_convolved_tokens_stay_tokens(batch) -> None:
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    with torch.no_grad():
        tokens = to_tokens(conv(to_map(torch.randn(batch, 35, 6), (5, 7))))
        stem = to_tokens(nn.Conv2d(3, 8, 3, padding=1)(channels_last(torch.randn(batch, 3, 5, 7))))
    assert tokens.is_contiguous()
    assert stem.is_contiguous()


def test_maps_of_one_and_of_three_axes() -> None:
    x = torch.randn(2, 24, 3)
    assert to_map(x, (24,)).shape == (2, 3, 24)
    assert torch.equal(to_map(x, (2, 3, 4)), x.transpose(1, 2).unflatten(2, (2, 3, 4)))
