"""Class and register tokens in attentions whose published form has none, against their equations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, gelu, normalize, scaled_dot_product_attention, softplus

from vislm.attention import (
    AgentAttention,
    AgentCswinAttention,
    LargeKernelAttention,
    MohAggregatedAttention,
    MohLlamaAttention,
)
from vislm.attention.dropout import attend_dropping
from vislm.kernels import RelativeBias, Window


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def drawn(module: torch.nn.Module, without: str = "-") -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.zero_() if without in name else parameter.normal_(0, 0.3)
    return module


class TestAgentsInStripes:
    def test_one_stripe_is_the_whole_map(self) -> None:
        whole = drawn(AgentAttention(8, 2, 4, 5, num_prefix_tokens=2))
        ours = AgentCswinAttention(8, 2, 4, 5, num_prefix_tokens=2)
        shared = ("qkv.", "proj.")
        ours.load_state_dict(
            {key if key.startswith(shared) else f"attns.0.{key}": entry for key, entry in whole.state_dict().items()}
        )
        x = torch.randn(2, 2 + 6 * 7, 8)
        torch.testing.assert_close(ours(x, (6, 7)), whole(x, (6, 7)))
        assert ours.macs((6, 7)) == whole.macs((6, 7))

    def test_prefix_tokens_take_the_mean_of_the_stripes(self) -> None:
        ours = drawn(AgentCswinAttention(8, 2, 4, 6, 3, num_prefix_tokens=1))
        ours.proj = torch.nn.Identity()
        x = torch.randn(1, 1 + 6 * 6, 8)
        output = ours(x, (6, 6))
        parts, prefix = x[:, 1:].view(1, 6, 6, 8), []
        for stripe in (parts[:, :, :3], parts[:, :, 3:]):  # vertical ones are a map of their own each
            narrow = AgentCswinAttention(8, 2, 4, 6, 3, num_prefix_tokens=1)
            narrow.load_state_dict(ours.state_dict(), strict=False)
            narrow.proj = torch.nn.Identity()
            alone = narrow(torch.cat((x[:, :1], stripe.flatten(1, 2)), 1), (6, 3))
            prefix.append(alone[:, 0, :4])
            rows = output[:, 1:].view(1, 6, 6, 8)[:, :, 3 * len(prefix) - 3 : 3 * len(prefix), :4]
            torch.testing.assert_close(rows.flatten(1, 2), alone[:, 1:, :4])
        torch.testing.assert_close(output[:, 0, :4], (prefix[0] + prefix[1]) / 2)


@pytest.mark.parametrize("grid", [(6, 7), (2, 5)])
def test_aggregated_heads_see_prefix_window_and_pooled_map(grid) -> None:
    height, width = grid
    ours = drawn(MohAggregatedAttention(8, 2, 2, 0, sr_ratio=2, num_prefix_tokens=2), "router")  # every gate is 1
    x = torch.randn(1, 2 + height * width, 8)
    sides = (height // 2, width // 2)
    pooled = adaptive_avg_pool2d(gelu(ours.sr(x[:, 2:].transpose(1, 2).unflatten(2, grid))), sides)
    pooled = ours.norm(pooled.flatten(2).transpose(1, 2))

    def heads(part: torch.Tensor) -> torch.Tensor:
        return part.unflatten(-1, (2, 4)).transpose(1, 2)[0]  # (H, N, D)

    unit = normalize(heads(ours.q(x)), dim=-1)
    keys, values = zip(*((normalize(heads(k), dim=-1), heads(v)) for k, v in pairs_of(ours, x, pooled)), strict=True)
    places = list(itertools.product(range(height), range(width)))
    table = ours.bias_table(*pool_offsets(grid, sides))
    outputs = []
    for index in range(len(places) + 2):
        if index < 2:  # all tokens, nothing learned by place
            query = (unit[:, index] + ours.query_embedding[:, 0]) * softplus(ours.temperature[:, 0])
            weights = torch.einsum("hd,hnd->hn", query * torch.tensor(float(x.shape[1])).log(), keys[0]).softmax(-1)
            outputs.append(torch.einsum("hn,hnd->hd", weights, values[0]))
            continue
        row, column = places[index - 2]
        window = [
            (2 + (row + dy) * width + column + dx, 3 * (dy + 1) + dx + 1)
            for dy, dx in itertools.product((-1, 0, 1), repeat=2)
            if 0 <= row + dy < height and 0 <= column + dx < width
        ]
        tokens, where = (list(entries) for entries in zip(*window, strict=True))
        count = 2 + len(window) + sides[0] * sides[1]
        query = (unit[:, index] + ours.query_embedding[:, 0]) * softplus(ours.temperature[:, 0])
        query = query * torch.tensor(float(count)).log()
        logits = torch.cat(
            (
                torch.einsum("hd,hnd->hn", query, keys[0][:, :2]),
                torch.einsum("hd,hnd->hn", query, keys[0][:, tokens]) + ours.relative_pos_bias_local[:, where],
                torch.einsum("hd,hnd->hn", query, keys[1]) + pool_bias(ours, table, grid, sides, row, column),
            ),
            dim=-1,
        )
        weights = logits.softmax(-1)
        seen = torch.cat((values[0][:, :2], values[0][:, tokens], values[1]), dim=1)
        mapped = torch.einsum("hd,hdp->hp", unit[:, index], ours.learnable_tokens) + ours.learnable_bias[:, 0]
        local = torch.einsum("hp,hpd->hd", mapped[:, where], values[0][:, tokens])
        outputs.append(torch.einsum("hn,hnd->hd", weights, seen) + local)
    expected = ours.proj(torch.stack(outputs).flatten(1))
    torch.testing.assert_close(ours(x, grid)[0], expected, atol=1e-4, rtol=1e-4)


def pairs_of(ours: MohAggregatedAttention, *sources: torch.Tensor):
    return [ours.kv(source).chunk(2, dim=-1) for source in sources]


def pool_offsets(grid, sides):
    """Return per axis the distinct distances of tokens from the means of the pooled cells, ascending."""
    return tuple(
        torch.tensor(sorted(set(distances(g, s).flatten().tolist()))) for g, s in zip(grid, sides, strict=True)
    )


def distances(size: int, bins: int) -> torch.Tensor:
    means = adaptive_avg_pool2d(torch.arange(size, dtype=torch.float32)[None, None, :, None], (bins, 1)).flatten()
    return torch.arange(size)[:, None] - means


def pool_bias(ours, table, grid, sides, row, column) -> torch.Tensor:
    rows, columns = (distances(g, s) for g, s in zip(grid, sides, strict=True))
    entries = []
    for y, x in itertools.product(range(sides[0]), range(sides[1])):
        at = [
            offsets.tolist().index(float(steps[place, cell]))
            for offsets, steps, place, cell in zip(
                pool_offsets(grid, sides), (rows, columns), (row, column), (y, x), strict=True
            )
        ]
        entries.append(table[:, at[0], at[1]])
    return torch.stack(entries, dim=-1)


class TestHeadsByQueryNormInAnEncoder:
    def test_all_heads_used_is_plain_attention(self) -> None:
        ours = MohLlamaAttention(8, 2, 1, 1, causal=False, rope_theta=None, num_prefix_tokens=3)
        x = torch.randn(2, 3 + 10, 8)
        parts = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (ours.q_proj, ours.k_proj, ours.v_proj))
        expected = ours.o_proj(scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        torch.testing.assert_close(ours(x, (2, 5)), expected, atol=1e-5, rtol=1e-5)
        assert ours.macs((2, 5)) == 4 * 13 * 64 + 2 * 13**2 * 8

    def test_an_odd_head_needs_no_rotation(self) -> None:
        ours = MohLlamaAttention(6, 2, causal=False, rope_theta=None)
        assert ours(torch.randn(1, 4, 6), (2, 2)).shape == (1, 4, 6)


def test_large_kernels_without_their_shortcut() -> None:
    ours = LargeKernelAttention(4, kernel_size=9)
    bare = LargeKernelAttention(4, kernel_size=9, shortcut=False)
    bare.load_state_dict(ours.state_dict())
    x = torch.randn(1, 30, 4)
    torch.testing.assert_close(bare(x, (5, 6)) + x, ours(x, (5, 6)))


@pytest.mark.parametrize("probability", [0.0, 1e-9])
def test_logits_of_prefix_tokens(probability) -> None:
    query, key, value = torch.randn(3, 2, 2, 2 + 12, 4).unbind(0)
    table, logits = torch.randn(2, 5, 7), torch.randn(2, 2, 2)
    pattern = Window((3, 4), (3, 4), prefix=2)
    bias = torch.zeros(1, 2, 14, 14)
    for (i, (y, x)), (j, (v, u)) in itertools.product(enumerate(itertools.product(range(3), range(4))), repeat=2):
        bias[0, :, 2 + i, 2 + j] = table[:, v - y + 2, u - x + 3]
    bias[0, :, 2:, :2] = logits[0][:, None]
    bias[0, :, :2, :2] = logits[1][:, None]
    ours = attend_dropping(
        query, key, value, probability, pattern=pattern, bias=RelativeBias(table), prefix_logits=logits
    )
    torch.testing.assert_close(ours, scaled_dot_product_attention(query, key, value, bias), atol=1e-5, rtol=1e-5)
