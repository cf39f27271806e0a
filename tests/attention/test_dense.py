"""Plain attention: timm's."""

from __future__ import annotations

import pytest
import torch

from vislm.attention import DenseAttention
from vislm.errors import UsageError


def test_equals_timm() -> None:
    from timm.models.vision_transformer import Attention

    torch.manual_seed(0)
    theirs = Attention(16, num_heads=4, qkv_bias=True)
    ours = DenseAttention(16, 4, num_prefix_tokens=1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 13, 16)
    torch.testing.assert_close(ours(x, (3, 4)), theirs(x), atol=1e-5, rtol=1e-5)


def test_options_and_cost() -> None:
    x = torch.randn(2, 13, 16)
    assert DenseAttention(16, 4, qk_scale=0.0, attn_drop=0.5)(x, (13,)).shape == x.shape
    uniform = DenseAttention(16, 4, qk_scale=0.0)
    torch.testing.assert_close(uniform(x, (13,)), uniform(x, (13,))[:, :1].expand(-1, 13, -1), atol=1e-6, rtol=1e-5)
    assert DenseAttention(16, 4, num_prefix_tokens=1).macs((3, 4)) == 4 * 13 * 256 + 2 * 169 * 16
    with pytest.raises(UsageError, match="num_prefix_tokens"):
        uniform(x, (3, 4))
    with pytest.raises(UsageError, match="not a multiple"):
        DenseAttention(16, 3)
