"""Neighborhood attention as a module: against plain attention with its mask, its options, its errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vislm.attention import NeighborhoodAttention, WindowAttention
from vislm.errors import UnknownName, UsageError


def dense(module: NeighborhoodAttention, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The module's equations with a mask and a bias written out pair by pair."""
    pattern, prefix = module.pattern(grid), module.num_prefix_tokens
    index = torch.arange(prefix + math.prod(grid))
    logits = torch.zeros(module.num_heads, len(index), len(index)).masked_fill(
        ~pattern.mask(index[:, None], index[None]), -torch.inf
    )
    if module.rpb is not None:
        place = torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(-1, len(grid))
        steps = (place[None] - place[:, None]) // torch.tensor(pattern.dilation) + torch.tensor(pattern.window) - 1
        inside = torch.isfinite(logits[0, prefix:, prefix:])
        steps = steps.masked_fill(~inside[..., None], 0).unbind(-1)
        logits[:, prefix:, prefix:] += torch.where(inside, module.rpb[(slice(None), *steps)], 0.0)
    query, key, value = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = scaled_dot_product_attention(query, key, value, attn_mask=logits, scale=module.scale)
    return module.proj(out.transpose(1, 2).flatten(2))


def randomized(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return module.eval()


CASES = [
    ((9, 11), {"window_size": 3, "rel_pos_bias": True}),
    ((9, 11), {"window_size": (3, 5), "dilation": (2, 1), "rel_pos_bias": True, "num_prefix_tokens": 2}),
    ((5, 8), {"window_size": (4, 3), "stride": (2, 3), "num_prefix_tokens": 1}),
    ((6, 6), {"window_size": 3, "causal": (True, False), "qkv_bias": False, "qk_scale": 0.7}),
    ((13,), {"window_size": (4,), "dilation": 3, "rel_pos_bias": True}),
    ((4, 5, 6), {"window_size": (4, 3, 3), "dilation": (1, 1, 2), "rel_pos_bias": True, "num_prefix_tokens": 1}),
    ((7, 7), {"window_size": 5, "border": "mask", "rel_pos_bias": True}),
]


@pytest.mark.parametrize(("grid", "options"), CASES)
def test_equals_plain_attention_with_the_mask(grid, options) -> None:
    module = randomized(NeighborhoodAttention(16, 2, **options))
    x = torch.randn(2, module.num_prefix_tokens + math.prod(grid), 16, generator=torch.Generator().manual_seed(1))
    leaves = [x.requires_grad_(), *module.parameters()]
    ours, theirs = module(x, grid), dense(module, x, grid)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    upstream = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    for mine, plain in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-4)


@given(
    rows=st.integers(3, 9), columns=st.integers(3, 9), window=st.integers(1, 3), batch=st.integers(1, 3), data=st.data()
)
def test_a_batch_is_its_samples(rows, columns, window, batch, data) -> None:
    dilation = data.draw(st.integers(1, min(rows, columns) // window))
    module = randomized(NeighborhoodAttention(8, 2, window, dilation=dilation, rel_pos_bias=True))
    x = torch.randn(batch, rows * columns, 8)
    alone = torch.cat([module(sample[None], (rows, columns)) for sample in x])
    torch.testing.assert_close(module(x, (rows, columns)), alone, atol=1e-6, rtol=1e-5)


def test_a_window_as_large_as_the_grid_is_full_attention() -> None:
    module = randomized(NeighborhoodAttention(16, 4, (6, 5)))
    x = torch.randn(2, 30, 16)
    query, key, value = module.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    full = module.proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, (6, 5)), full, atol=1e-5, rtol=1e-5)


def test_a_stride_of_the_window_is_window_attention() -> None:
    module = randomized(NeighborhoodAttention(16, 2, 4, stride=4))
    window = WindowAttention(16, 2, 4, rel_pos_bias=False)
    window.load_state_dict(module.state_dict())
    x = torch.randn(2, 96, 16)
    torch.testing.assert_close(module(x, (8, 12)), window(x, (8, 12)), atol=1e-5, rtol=1e-5)


def test_small_inputs_raise_by_default() -> None:
    module = NeighborhoodAttention(8, 2, 7, dilation=2)
    with pytest.raises(UsageError, match=r"window 7 x dilation 2 = 14 is larger than axis 1 of the grid \(14, 9\)"):
        module(torch.randn(1, 126, 8), (14, 9))


def test_padding_small_inputs_lets_zero_tokens_take_part() -> None:
    module = randomized(NeighborhoodAttention(8, 2, 3, dilation=2, rel_pos_bias=True, small_input="pad"))
    x = torch.randn(2, 4 * 8, 8)
    padded = torch.zeros(2, 6, 8, 8)
    padded[:, :4] = x.view(2, 4, 8, 8)
    expected = module(padded.flatten(1, 2), (6, 8)).view(2, 6, 8, 8)[:, :4].flatten(1, 2)
    torch.testing.assert_close(module(x, (4, 8)), expected)
    large = torch.randn(1, 49, 8)
    strict = NeighborhoodAttention(8, 2, 3, dilation=2, rel_pos_bias=True)
    strict.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(large, (7, 7)), strict(large, (7, 7)))


def test_shrinking_small_inputs_uses_the_middle_of_the_table() -> None:
    module = randomized(NeighborhoodAttention(8, 2, 7, stride=3, rel_pos_bias=True, small_input="shrink"))
    smaller = NeighborhoodAttention(8, 2, (2, 7), stride=(2, 3), rel_pos_bias=True)
    smaller.load_state_dict({**module.state_dict(), "rpb": module.rpb[:, 5:8]})
    x = torch.randn(1, 2 * 8, 8)
    torch.testing.assert_close(module(x, (2, 8)), smaller(x, (2, 8)))
    dilated = NeighborhoodAttention(8, 2, 3, dilation=5, small_input="shrink")
    assert dilated.pattern((3, 11)).window == (1, 2)
    assert dilated.pattern((3, 11)).dilation == (3, 5)
    assert dilated(torch.randn(1, 33, 8), (3, 11)).shape == (1, 33, 8)


def test_dropout_of_weights() -> None:
    module = randomized(NeighborhoodAttention(8, 2, 3, rel_pos_bias=True, attn_drop=1.0))
    x = torch.randn(2, 30, 8)
    plain = dense(module, x, (5, 6))
    torch.testing.assert_close(module(x, (5, 6)), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.train()(x, (5, 6)), module.proj.bias.expand(2, 30, 8))
    module.attn_drop = 0.5
    torch.manual_seed(0)
    draws = torch.stack([module(x, (5, 6)) for _ in range(400)])
    torch.testing.assert_close(draws.mean(0), plain, atol=0.25, rtol=0.1)
    assert draws.std(0).min() > 0
    draws.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype) -> None:
    module = randomized(NeighborhoodAttention(16, 2, 3, rel_pos_bias=True))
    x = torch.randn(1, 42, 16)
    expected = module(x, (6, 7))
    ours = module.to(dtype)(x.to(dtype), (6, 7))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), expected, atol=1e-6 if dtype == torch.float64 else 3e-2, rtol=3e-2)


def test_autocast() -> None:
    module = randomized(NeighborhoodAttention(16, 2, 3, rel_pos_bias=True))
    x = torch.randn(1, 42, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = module(x, (6, 7))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), module(x, (6, 7)), atol=3e-2, rtol=3e-2)


def test_macs_count_the_visible_pairs() -> None:
    module = NeighborhoodAttention(16, 2, (3, 5), dilation=(2, 1), num_prefix_tokens=3)
    index = torch.arange(3 + 63)
    pairs = int(module.pattern((7, 9)).mask(index[:, None], index[None]).sum())
    assert module.macs((7, 9)) == 66 * 4 * 16**2 + 2 * 16 * pairs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "dim=16 is not a multiple of num_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"window_size": 0}, "window=.*0, 0.*expected an integer >= 1"),
        ({"window_size": (3, 3), "dilation": (1, 1, 1)}, "dilation="),
        ({"stride": 8}, "stride 8 is larger than the window 7"),
        ({"causal": True, "rel_pos_bias": True}, "not defined with causal=True"),
        ({"border": "shft"}, "did you mean 'shift'"),
        ({"small_input": "padd"}, "did you mean 'pad'"),
    ],
)
def test_wrong_options(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        NeighborhoodAttention(16, **{"num_heads": 2, **options})


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((1, 63, 16), (8, 8), r"expected \(B, N, C\) = \(B, 64, 16\)"),
        ((1, 64, 8), (8, 8), r"expected \(B, N, C\) = \(B, 64, 16\)"),
        ((1, 16, 8, 8), (8, 8), "shape"),
        ((1, 64, 16), (64,), "expected 2 positive sizes"),
        ((1, 64, 16), (64, 0), "expected 2 positive sizes"),
    ],
)
def test_wrong_inputs(shape, grid, message) -> None:
    with pytest.raises(UsageError, match=message):
        NeighborhoodAttention(16, 2)(torch.zeros(shape), grid)


def test_unknown_modes_are_unknown_names() -> None:
    with pytest.raises(UnknownName):
        NeighborhoodAttention(16, 2, small_input="grow")


def test_prefix_tokens_stay_in_front_of_padding() -> None:
    module = randomized(NeighborhoodAttention(8, 2, 3, dilation=2, small_input="pad", num_prefix_tokens=2))
    prefix, patches = torch.randn(1, 2, 8), torch.randn(1, 4, 8, 8)
    padded = torch.zeros(1, 6, 8, 8)
    padded[:, :4] = patches
    whole = module(torch.cat((prefix, padded.flatten(1, 2)), dim=1), (6, 8))
    ours = module(torch.cat((prefix, patches.flatten(1, 2)), dim=1), (4, 8))
    torch.testing.assert_close(ours, whole[:, : 2 + 4 * 8])
