"""Agent attention: against its equations written out, on any grid, with prefix tokens, padding and reduced keys."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate

from vislm.attention import AgentAttention
from vislm.errors import UsageError


def randomized(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module.eval()


def bilinear(maps, size):
    return interpolate(maps, size, mode="bilinear", align_corners=False)


def written_out(module, x, grid):
    """The equations with explicit matrices; for equal agent shapes, or with the agent axis resized last."""
    prefix, heads = module.num_prefix_tokens, module.num_heads
    if module.separate_kv:
        query, (key, value) = module.q(x), module.kv(x).chunk(2, -1)
    else:
        query, key, value = module.qkv(x).chunk(3, -1)
    agents = adaptive_avg_pool2d(query[:, prefix:].mT.unflatten(2, grid), module.agent_shape).flatten(2).mT

    def split(tokens):
        return tokens.unflatten(2, (heads, -1)).transpose(1, 2)

    def reshaped(logits):
        side = module.agent_side
        logits = logits.flatten(2).mT.unflatten(2, (side, side))
        return bilinear(logits, module.agent_shape).flatten(2).mT

    block = bilinear(module.an_bias, grid)
    first = reshaped(block + bilinear((module.ah_bias + module.aw_bias)[0], grid))
    lines = (module.ha_bias + module.wa_bias)[0].permute(0, 3, 1, 2)
    second = reshaped(bilinear(module.na_bias, grid) + bilinear(lines, grid)).mT
    if prefix:
        first = torch.cat((reshaped(module.ac_bias[0][..., None]), first), dim=-1)
        second = torch.cat((reshaped(module.ca_bias[0].mT[..., None]).mT, second), dim=-2)
    gathered = ((split(agents) * module.scale) @ split(key).mT + first).softmax(-1) @ split(value)
    out = ((split(query) * module.scale) @ split(agents).mT + second).softmax(-1) @ gathered
    out = out.transpose(1, 2).flatten(2)
    maps = value[:, prefix:].mT.unflatten(2, grid)
    local = conv2d(maps, module.dwc.weight, module.dwc.bias, padding=module.dwc.padding, groups=maps.shape[1])
    out = torch.cat((out[:, :prefix], out[:, prefix:] + local.flatten(2).mT), dim=1)
    return module.proj(out)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(4, 11), st.integers(4, 11)),
    table=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    shape=st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 4))),
    prefix=st.integers(0, 3),
    separate_kv=st.booleans(),
    qkv_bias=st.booleans(),
    kernel_size=st.sampled_from([1, 3, 5]),
)
def test_equals_its_equations(grid, table, shape, prefix, separate_kv, qkv_bias, kernel_size) -> None:
    torch.manual_seed(0)
    module = randomized(
        AgentAttention(
            8,
            2,
            9,
            table,
            agent_shape=shape,
            separate_kv=separate_kv,
            qkv_bias=qkv_bias,
            kernel_size=kernel_size,
            num_prefix_tokens=prefix,
        )
    )
    x = torch.randn(2, prefix + grid[0] * grid[1], 8)
    torch.testing.assert_close(module(x, grid), written_out(module, x, grid), atol=2e-5, rtol=1e-4)


def test_reduced_keys() -> None:
    torch.manual_seed(0)
    module = randomized(AgentAttention(8, 2, 4, (6, 8), separate_kv=True, sr_ratio=2))
    assert module.ah_bias.shape == (1, 2, 4, 3, 1)
    assert module.ha_bias.shape == (1, 2, 6, 1, 4)
    x = torch.randn(2, 48, 8)
    reduced = module.norm(module.sr(x.mT.unflatten(2, (6, 8))).flatten(2).mT)
    key, value = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in module.kv(reduced).chunk(2, -1))
    query = module.q(x)
    agents = adaptive_avg_pool2d(query.mT.unflatten(2, (6, 8)), 2).flatten(2).mT
    query, agents = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in (query, agents))
    first = bilinear(module.an_bias, (3, 4)).flatten(2) + (module.ah_bias + module.aw_bias).flatten(3)
    lines = (module.ha_bias + module.wa_bias)[0].flatten(1, 2)
    second = bilinear(module.na_bias, (6, 8)).flatten(2).mT + lines
    gathered = (agents @ key.mT * 0.5 + first).softmax(-1) @ value
    out = ((query @ agents.mT * 0.5 + second).softmax(-1) @ gathered).transpose(1, 2).flatten(2)
    local = module.dwc(bilinear(module.kv(reduced).chunk(2, -1)[1].mT.unflatten(2, (3, 4)), (6, 8)))
    torch.testing.assert_close(module(x, (6, 8)), module.proj(out + local.flatten(2).mT), atol=2e-5, rtol=1e-4)
    padded = torch.zeros(1, 6, 8, 8)
    padded[:, :5, :7] = x[:1].unflatten(1, (6, 8))[:, :5, :7]
    odd = module(padded[:, :5, :7].flatten(1, 2), (5, 7))
    assert odd.shape == (1, 35, 8)
    assert module.macs((5, 7)) == 2 * 64 * (35 + 12) + 12 * 8 * 8 * 4 + 2 * 4 * 8 * (35 + 12) + 9 * 35 * 8


def test_padding_does_not_matter() -> None:
    torch.manual_seed(0)
    module = randomized(AgentAttention(8, 2, 4, 6, num_prefix_tokens=1))
    x, valid = torch.randn(2, 37, 8), torch.rand(2, 37) < 0.7
    valid[:, 0] = True
    noise = torch.where(valid[..., None], x, 100 * torch.randn_like(x))
    torch.testing.assert_close(module(x, (6, 6), valid)[valid], module(noise, (6, 6), valid)[valid])
    everything = torch.ones_like(valid)
    torch.testing.assert_close(module(x, (6, 6), everything), module(x, (6, 6)), atol=1e-5, rtol=1e-5)
    valid[1, 1:] = False
    assert bool(module(x, (6, 6), valid).isfinite().all())


@pytest.mark.parametrize("options", [{}, {"separate_kv": True, "sr_ratio": 2}, {"num_prefix_tokens": 2}])
def test_batches_gradients_and_half_precision(options) -> None:
    torch.manual_seed(0)
    module = randomized(AgentAttention(16, 2, 9, 8, **options))
    x = torch.randn(3, options.get("num_prefix_tokens", 0) + 70, 16)
    y = module(x, (7, 10))
    alone = torch.cat([module(sample[None], (7, 10)) for sample in x])
    torch.testing.assert_close(y, alone, atol=1e-5, rtol=1e-5)
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x, (7, 10)).float(), y, atol=0.3, rtol=0.1)
    half = module.bfloat16()(x.bfloat16(), (7, 10))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, atol=0.3, rtol=0.1)


def test_dropout_of_both_attentions() -> None:
    module = AgentAttention(8, 2, 4, 6, attn_drop=1.0)
    module.dwc.weight.data.zero_()
    module.dwc.bias.data.zero_()
    x = torch.randn(1, 36, 8)
    torch.testing.assert_close(module(x, (6, 6)), module.proj.bias.expand(1, 36, 8))
    assert module.eval()(x, (6, 6)).std() > 0


def test_only_the_tables_take_no_weight_decay() -> None:
    module = AgentAttention(8, 2, 4, 6, num_prefix_tokens=1)
    assert module.no_weight_decay() == {name for name, p in module.named_parameters() if name.endswith("_bias")}
    assert len(module.no_weight_decay()) == 8
    tables = 98 * 2 * 4 + 2 * 4 * 12 + 2 * 4 * 12 + 2 * 2 * 4
    assert sum(getattr(module, name).numel() for name in module.no_weight_decay()) == tables


def test_macs() -> None:
    tokens, dim, agents = 8 * 10, 16, 9
    expected = 4 * tokens * dim**2 + 4 * agents * tokens * dim + 9 * tokens * dim
    assert AgentAttention(dim, 2, agents).macs((8, 10)) == expected


def test_more_agents_than_tokens_is_said() -> None:
    module = AgentAttention(8, 2, 9, 4)
    with pytest.warns(UserWarning, match=r"\(3, 3\) agents on a map of \(2, 5\)"):
        assert module(torch.randn(1, 10, 8), (2, 5)).shape == (1, 10, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(torch.randn(1, 9, 8), (3, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "not a multiple"),
        ({"agent_num": 50}, "a square number"),
        ({"agent_num": 0}, "a square number"),
        ({"kernel_size": 2}, "an odd number"),
        ({"agent_shape": (0, 2)}, "two positive numbers"),
        ({"agent_shape": (2, 2, 2)}, "each of 2 axes"),
        ({"sr_ratio": 2}, "separate_kv=True"),
        ({"sr_ratio": 2, "separate_kv": True, "num_prefix_tokens": 1}, "no prefix tokens"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        AgentAttention(**{"dim": 8, "num_heads": 2, **options})


def test_bad_inputs() -> None:
    module = AgentAttention(8, 2, 4, 4)
    with pytest.raises(UsageError, match="num_prefix_tokens"):
        module(torch.zeros(1, 17, 8), (4, 4))
    with pytest.raises(UsageError, match=r"torch.bool \(B, N\) = \(1, 16\)"):
        module(torch.zeros(1, 16, 8), (4, 4), torch.ones(1, 16))
