"""Window attention as a module: against timm's Swin block, with padding, shifts and prefix tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vislm.attention import WindowAttention
from vislm.errors import UsageError

GRIDS = [((14, 14), 7), ((9, 10), 4), ((5, 12), 7), ((13, 6), 5), ((6, 6), 6), ((3, 3), 4)]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_equals_timm(grid, window, shifted) -> None:
    from timm.models.swin_transformer import SwinTransformerBlock

    torch.manual_seed(0)
    block = SwinTransformerBlock(16, grid, num_heads=2, window_size=window, shift_size=window // 2 if shifted else 0)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    ours = WindowAttention(16, 2, tuple(block.window_size), shifted=shifted)
    ours.load_state_dict(block.attn.state_dict())
    x = torch.randn(2, *grid, 16, requires_grad=True)
    theirs, mine = block._attn(x), ours(x.flatten(1, 2), grid).unflatten(1, grid)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(theirs)
    expected = torch.autograd.grad(theirs, [x, *block.attn.parameters()], upstream)
    named = dict(ours.named_parameters())
    leaves = [x, *(named[name] for name, _ in block.attn.named_parameters())]
    for ours_gradient, gradient in zip(torch.autograd.grad(mine, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(ours_gradient, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shifted", [False, True])
def test_prefix_tokens_see_and_are_seen(shifted) -> None:
    torch.manual_seed(0)
    module = WindowAttention(8, 2, 3, shifted=shifted, rel_pos_bias=False, num_prefix_tokens=2)
    x, index = torch.randn(2, 2 + 54, 8), torch.arange(56)
    allowed = module.pattern((6, 9)).mask(index[:, None], index[None])
    assert bool(allowed[:2].all())
    assert bool(allowed[:, :2].all())
    query, key, value = module.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    plain = scaled_dot_product_attention(query, key, value, attn_mask=allowed).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x, (6, 9)), module.proj(plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("grid", "window"), [((12,), (4,)), ((4, 6, 6), (2, 3, 3))])
def test_other_numbers_of_axes(grid, window) -> None:
    module = WindowAttention(8, 2, window, shifted=True)
    x = torch.randn(1, math.prod(grid), 8)
    out = module(x, grid)
    assert out.shape == x.shape
    (gradient,) = torch.autograd.grad(out.sum(), [module.relative_position_bias_table])
    assert gradient.abs().sum() > 0


def test_dropout_of_weights() -> None:
    module = WindowAttention(8, 2, 3, attn_drop=1.0)
    x = torch.randn(1, 36, 8)
    torch.testing.assert_close(module(x, (6, 6)), module.proj.bias.expand(1, 36, 8))
    assert module.eval()(x, (6, 6)).std() > 0


def test_macs_of_whole_windows() -> None:
    module = WindowAttention(16, 2, 4)
    assert module.macs((8, 8)) == 64 * 4 * 256 + 2 * 16 * 64 * 16
    assert module.macs((7, 5)) == module.macs((8, 8))


def test_bad_inputs() -> None:
    with pytest.raises(UsageError, match="not a multiple"):
        WindowAttention(16, 3)
    with pytest.raises(UsageError, match="expected 2 positive sizes"):
        WindowAttention(16, 2)(torch.zeros(1, 8, 16), (8,))
    with pytest.raises(UsageError, match="num_prefix_tokens"):
        WindowAttention(16, 2)(torch.zeros(1, 65, 16), (8, 8))


def test_prefix_tokens_stay_in_front_of_padding() -> None:
    torch.manual_seed(0)
    module = WindowAttention(8, 2, 4, num_prefix_tokens=2)
    prefix, patches = torch.randn(1, 2, 8), torch.randn(1, 6, 8, 8)
    padded = torch.zeros(1, 8, 8, 8)
    padded[:, :6] = patches
    whole = module(torch.cat((prefix, padded.flatten(1, 2)), dim=1), (8, 8))
    ours = module(torch.cat((prefix, patches.flatten(1, 2)), dim=1), (6, 8))
    torch.testing.assert_close(ours, whole[:, : 2 + 6 * 8])
    module.shifted = True
    assert module(torch.cat((prefix, patches.flatten(1, 2)), dim=1), (6, 8)).shape == ours.shape
