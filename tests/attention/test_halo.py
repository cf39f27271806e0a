"""Halo attention as a module: against timm, with padding, hidden borders and prefix tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vislm.attention import HaloAttention, WindowAttention
from vislm.errors import UsageError

CASES = [
    ({"dim": 16, "num_heads": 2, "block_size": 4, "halo_size": 1}, (8, 12)),
    ({"dim": 16, "dim_out": 24, "num_heads": 4, "stride": 2, "block_size": 4, "halo_size": 3, "qk_ratio": 0.5}, (8, 8)),
    ({"dim": 16, "num_heads": 2, "stride": 2, "block_size": 3, "halo_size": 1, "qkv_bias": True}, (9, 6)),
    (
        {"dim": 24, "num_heads": 2, "block_size": 7, "halo_size": 2, "qk_ratio": 0.33, "avg_down": True, "stride": 2},
        (14, 7),
    ),
    ({"dim": 8, "num_heads": 2, "dim_head": 6, "block_size": 2, "halo_size": 0, "scale_pos_embed": True}, (4, 6)),
]


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return module


@pytest.mark.parametrize(("options", "grid"), CASES)
def test_equals_timm(options, grid) -> None:
    from timm.layers.halo_attn import HaloAttn

    theirs, ours = randomized(HaloAttn(**options)), HaloAttention(**options)
    ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(1)
    x = torch.randn(2, options["dim"], *grid, requires_grad=True)
    y = ours(x.flatten(2).transpose(1, 2), grid).transpose(1, 2).unflatten(2, ours.out_grid(grid))
    expected = theirs(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(y)
    leaves = dict(ours.named_parameters())
    gradients = torch.autograd.grad(y, [x, *(leaves[name] for name, _ in theirs.named_parameters())], upstream)
    for ours_gradient, gradient in zip(
        gradients, torch.autograd.grad(expected, [x, *theirs.parameters()], upstream), strict=True
    ):
        torch.testing.assert_close(ours_gradient, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("stride", "grid"), [(1, (6, 9)), (1, (7, 5)), (2, (8, 6)), (2, (7, 5))])
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_hidden_borders_are_plain_attention_with_a_mask(stride, grid, num_prefix) -> None:
    module = HaloAttention(
        8, num_heads=2, block_size=4, halo_size=1, stride=stride, mask_padding=True, num_prefix_tokens=num_prefix
    )
    randomized(module)
    with torch.no_grad():
        module.pos_embed.height_rel.zero_()
        module.pos_embed.width_rel.zero_()
    height, width = grid
    x = torch.randn(2, num_prefix + height * width, 8, generator=torch.Generator().manual_seed(2))
    keys = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    asks = (keys % stride == 0).all(-1)
    first = keys[asks] // 4 * 4
    near = ((keys >= first[:, None] - 1) & (keys <= first[:, None] + 4)).all(-1)
    allowed = torch.ones(num_prefix + len(near), num_prefix + len(keys), dtype=torch.bool)
    allowed[num_prefix:, num_prefix:] = near
    asking = torch.cat((torch.ones(num_prefix, dtype=torch.bool), asks))
    query = (x[:, asking] @ module.q.weight[:, :, 0, 0].T).unflatten(-1, (2, -1)).transpose(1, 2)
    key, value = (x @ module.kv.weight[:, :, 0, 0].T).unflatten(-1, (2, 8)).transpose(1, 2).split(4, dim=-1)
    plain = scaled_dot_product_attention(query, key, value, attn_mask=allowed).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x, grid), plain, atol=1e-5, rtol=1e-5)


def test_tokens_that_pad_the_map_are_hidden() -> None:
    module = randomized(HaloAttention(8, num_heads=2, block_size=4, halo_size=2, qkv_bias=True))
    x = torch.randn(1, 7 * 9, 8)
    assert module(x, (7, 9)).shape == (1, 63, 8)
    # Queries whose window ends inside of the map see no padding: the same block alone gives the same.
    whole = torch.zeros(1, 8, 12, 8)
    whole[:, :7, :9] = x.view(1, 7, 9, 8)
    alike = module(whole.flatten(1, 2), (8, 12)).view(1, 8, 12, 8)[:, :4, :4]
    far = module(x, (7, 9)).view(1, 7, 9, 8)[:, :4, :4]
    torch.testing.assert_close(far, alike)
    assert not torch.allclose(
        module(x, (7, 9)).view(1, 7, 9, 8)[:, 4:, 4:8],
        module(whole.flatten(1, 2), (8, 12)).view(1, 8, 12, 8)[:, 4:7, 4:8],
    )


def test_without_halo_and_position_it_is_window_attention() -> None:
    module = randomized(HaloAttention(8, num_heads=2, block_size=4, halo_size=0))
    window = WindowAttention(8, 2, 4, rel_pos_bias=False, qkv_bias=False)
    key, value = module.kv.weight[:, :, 0, 0].unflatten(0, (2, 8)).split(4, dim=1)
    with torch.no_grad():
        module.pos_embed.height_rel.zero_()
        module.pos_embed.width_rel.zero_()
        window.qkv.weight.copy_(torch.cat((module.q.weight[:, :, 0, 0], key.flatten(0, 1), value.flatten(0, 1))))
        window.proj.weight.copy_(torch.eye(8))
        window.proj.bias.zero_()
    x = torch.randn(2, 64, 8)
    torch.testing.assert_close(module(x, (8, 8)), window(x, (8, 8)), atol=1e-5, rtol=1e-5)


def test_macs() -> None:
    module = HaloAttention(16, 32, num_heads=4, dim_head=4, stride=2, block_size=4, halo_size=1)
    queries, keys, window = 16, 64, 6
    products = queries * window**2 * 4 * (4 + 8) + queries * 4 * 4 * 2 * 11
    assert module.macs((8, 8)) == queries * 16 * 16 + keys * 16 * 4 * 12 + products


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 3}, "stride=3, expected 1 or 2"),
        ({"block_size": 0}, "block_size=0"),
        ({"halo_size": -1}, "halo_size=-1"),
        ({"num_heads": 3}, "not a multiple of num_heads=3"),
    ],
)
def test_wrong_options(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        HaloAttention(16, **options)


def test_wrong_inputs() -> None:
    with pytest.raises(UsageError, match="expected 2 positive sizes"):
        HaloAttention(16)(torch.zeros(1, 64, 16), (4, 4, 4))
    with pytest.raises(UsageError, match="num_prefix_tokens"):
        HaloAttention(16)(torch.zeros(1, 65, 16), (8, 8))
