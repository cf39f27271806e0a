"""Mixture-of-head attentions against their equations written out; skipped heads; errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, gelu, normalize, softplus

from vislm.attention import MohAggregatedAttention, MohAttention, MohCosineAttention, MohLlamaAttention, active_heads
from vislm.attention.moh_pooled import PooledGrid
from vislm.errors import UsageError
from vislm.kernels import attend


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return module.eval()


def split(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def gates(router: nn.Module, x: Tensor) -> Tensor:
    """The gates as the paper's code has them, token by token."""
    rows = []
    for token in x.flatten(0, 1):
        shared = torch.ones(router.shared_heads)
        if router.shared_heads > 1:
            shared = router.shared_heads * (router.wg_1.weight @ token).softmax(0)
        if router.wg is None:
            rows.append(shared)
            continue
        p = (router.wg.weight @ token).softmax(0)
        kept = set(p.sort(descending=True, stable=True).indices[: router.routed_heads].tolist())
        total = sum(p[i] for i in kept)
        routed = torch.stack([router.routed_heads * p[i] / total if i in kept else 0 * p[i] for i in range(len(p))])
        groups = 2 * (router.wg_0.weight @ token).softmax(0) if router.shared_heads else torch.ones(2)
        rows.append(torch.cat((groups[0] * shared, groups[1] * routed)))
    return torch.stack(rows).unflatten(0, x.shape[:2])


def finished(module: nn.Module, x: Tensor, heads: Tensor) -> Tensor:
    gated = heads * gates(module.router, x).transpose(1, 2)[..., None]
    return module.proj(gated.transpose(1, 2).flatten(2))


def position_bias(module: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    """The bias ``(H, N, M)`` of positions ``(N, 2)`` and ``(M, 2)``, from their distances directly."""
    side = torch.tensor(module.pretrained_grid)
    apart = 8 * (query[:, None] - key[None]) / (side - 1).clamp_min(1)
    place = apart.sign() * (apart.abs() + 1).log2() / math.log2(8)
    return module.cpb_fc2(module.cpb_fc1(place).relu()).permute(2, 0, 1)


def places(grid: tuple[int, int]) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(float(side)) for side in grid)).view(-1, 2)


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    upstream = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    gradients = (torch.autograd.grad(y, leaves, upstream) for y in (ours, theirs))
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"shared_heads": 2, "routed_heads": 2},
        {"shared_heads": 0, "routed_heads": 4},
        {"shared_heads": 1, "routed_heads": 5, "qkv_bias": False},
        {"shared_heads": 6, "routed_heads": 0},
        {"head_dim": 7, "qk_norm": True, "num_prefix_tokens": 2},
        {"qk_scale": 0.7},
    ],
)
def test_vanilla_heads_times_their_gates(options) -> None:
    module = randomized(MohAttention(24, 6, **options))
    x = torch.randn(2, 20 + module.num_prefix_tokens, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    query, key, value = (split(part, 6) for part in module.qkv(x).chunk(3, dim=-1))
    logits = module.scale * module.q_norm(query) @ module.k_norm(key).transpose(-1, -2)
    assert_same(module(x, (4, 5)), finished(module, x, logits.softmax(-1) @ value), [x, *module.parameters()])


@pytest.mark.parametrize(("grid", "prefix"), [((4, 4), 0), ((3, 7), 2), ((1, 1), 0)])
def test_cosine_heads_with_a_bias_from_the_distances(grid, prefix) -> None:
    module = randomized(MohCosineAttention(24, 6, 2, 2, pretrained_grid=(5, 4), num_prefix_tokens=prefix))
    x = torch.randn(2, prefix + math.prod(grid), 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    query, key, value = (split(part, 6) for part in module.qkv(x).chunk(3, dim=-1))
    query = (normalize(query, dim=-1) + module.query_embedding) * softplus(module.temperature) * math.log(x.shape[1])
    logits = query @ normalize(key, dim=-1).transpose(-1, -2)
    at = places(grid)
    bias = nn.functional.pad(position_bias(module, at, at), (prefix, 0, prefix, 0))
    theirs = finished(module, x, (logits + bias).softmax(-1) @ value)
    assert_same(module(x, grid), theirs, [x, *module.parameters()])


def aggregated(module: MohAggregatedAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """One softmax over all tokens, those outside the window hidden, and all pooled tokens."""
    count, at = module.num_heads, places(grid)
    sides = tuple(max(side // module.sr_ratio, 1) for side in grid)
    image = x.transpose(1, 2).unflatten(2, grid)
    coarse = adaptive_avg_pool2d(gelu(module.sr(image)), sides).flatten(2).transpose(1, 2)
    centres = adaptive_avg_pool2d(at.t().unflatten(1, grid), sides).flatten(1).t()
    key, value = (split(part, count) for part in module.kv(x).chunk(2, dim=-1))
    pooled_key, pooled_value = (split(part, count) for part in module.kv(module.norm(coarse)).chunk(2, dim=-1))
    reach = module.window_size // 2
    step = at[None] - at[:, None]
    seen = (step.abs() <= reach).all(dim=-1)
    slot = ((step[..., 0] + reach) * module.window_size + step[..., 1] + reach).long().masked_fill(~seen, 0)
    unit = normalize(split(module.q(x), count), dim=-1)
    lengths = (seen.sum(dim=1) + len(centres)).float().log()[:, None]
    query = (unit + module.query_embedding) * softplus(module.temperature) * lengths
    local = query @ normalize(key, dim=-1).transpose(-1, -2) + module.relative_pos_bias_local[:, slot]
    pooled = query @ normalize(pooled_key, dim=-1).transpose(-1, -2) + position_bias(module, at, centres)
    weight = torch.cat((local.masked_fill(~seen, -torch.inf), pooled), dim=-1).softmax(-1)
    extra = (unit @ module.learnable_tokens + module.learnable_bias).gather(-1, slot.expand(*unit.shape[:2], -1, -1))
    mixed = (weight[..., : len(at)] + extra * seen) @ value + weight[..., len(at) :] @ pooled_value
    return finished(module, x, mixed)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((8, 8), {"sr_ratio": 2}),
        ((6, 9), {"sr_ratio": 3, "window_size": 5, "qkv_bias": False}),
        ((7, 5), {"sr_ratio": 2}),
        ((2, 9), {"sr_ratio": 4, "window_size": 5}),
        ((1, 1), {"sr_ratio": 8}),
        ((8, 8), {"sr_ratio": 2, "shared_heads": 4, "routed_heads": 0}),
    ],
)
def test_aggregated_heads_are_one_softmax_over_window_and_pooled_map(grid, options, skip) -> None:
    options = {"shared_heads": 1, "routed_heads": 2, **options}
    module = randomized(MohAggregatedAttention(16, 4, pretrained_grid=8, skip_heads=skip, **options))
    x = torch.randn(2, math.prod(grid), 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert_same(module(x, grid), aggregated(module, x, grid), [x, *module.parameters()])


@pytest.mark.parametrize("skip", [False, True])
def test_little_of_the_position_bias_is_in_memory_at_once(skip, monkeypatch) -> None:
    module = randomized(MohAggregatedAttention(16, 4, 1, 2, sr_ratio=2, pretrained_grid=8, skip_heads=skip))
    x = torch.randn(2, 63, 16)
    found = []
    for chunk in (None, 4 * 12 * 10):
        if chunk is not None:
            monkeypatch.setattr("vislm.attention.moh_pooled.CHUNK", chunk)
            monkeypatch.setattr("vislm.attention.moh_position.CHUNK", chunk * 512)
        y = module(x, (7, 9))
        found.append((y, torch.autograd.grad(y.square().sum(), list(module.parameters()))))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


@given(side=st.integers(1, 40), ratio=st.integers(1, 9))
def test_distances_to_pooled_tokens_are_all_there_once(side, ratio) -> None:
    pooled = PooledGrid((side, 1), ratio)
    centres = adaptive_avg_pool2d(torch.arange(float(side)).view(1, side, 1), (pooled.sides[0], 1)).flatten()
    apart = torch.arange(side)[:, None] - centres[None]
    rows, columns = pooled.offsets()
    assert len(rows) <= 4 * side
    assert rows.unique().tolist() == rows.tolist()
    assert columns.tolist() == [0.0]
    torch.testing.assert_close(pooled.expanded(rows.view(1, -1, 1), 0, side)[0, :, :-1], apart)


@pytest.mark.parametrize(("shared", "routed", "spread"), [(0, 2, 0.1), (2, 2, 0.3), (3, 4, 3.0), (7, 1, 0.3)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_skipping_heads_changes_neither_output_nor_gradients(shared, routed, spread, tokens) -> None:
    dense = randomized(MohAttention(16, 8, shared, routed, skip_heads=False)).double().train()
    nn.init.normal_(dense.router.wg.weight, std=spread)
    sparse = MohAttention(16, 8, shared, routed, skip_heads=True).double()
    sparse.load_state_dict(dense.state_dict())
    x = torch.randn(3, tokens, 16, dtype=torch.float64)
    found = []
    for module in (dense, sparse):
        leaf = x.clone().requires_grad_()
        y = module(leaf, (tokens,))
        found.append((y, torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])))
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=1e-7)


def test_skipped_heads_are_not_computed(monkeypatch) -> None:
    pairs = []

    def counting(query, key, value, **options):
        pairs.append(query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2])
        return attend(query, key, value, **options)

    monkeypatch.setattr(active_heads, "attend", counting)
    module = randomized(MohAttention(32, 8, 2, 2, skip_heads=True))
    nn.init.normal_(module.router.wg.weight, std=0.02)
    tokens = 256
    module(torch.randn(2, tokens, 32), (16, 16))
    used, everything = 2 * 4 * tokens**2, 2 * 8 * tokens**2
    assert used <= sum(pairs) <= used + everything / active_heads.BINS


def test_skipping_heads_computes_fewer_logits(monkeypatch) -> None:
    module = randomized(MohAttention(384, 12, 2, 4))
    nn.init.normal_(module.router.wg.weight, std=0.02)
    x, logits = torch.randn(1, 1024, 384), []
    query, key, value = (split(part, 12) for part in module.qkv(x).detach().chunk(3, dim=-1))

    def counting(query, key, value, **options):
        logits.append(query.shape[:-1].numel() * key.shape[-2])
        return attend(query, key, value, **options)

    monkeypatch.setattr(active_heads, "attend", counting)
    kept = module.router(x).kept
    active_heads.attend_active(query, key, value, kept)
    used = (2 * 1024 + int(kept.sum())) * 1024
    assert module.router.skips(None, 1024)
    assert used <= sum(logits) <= used + 12 * 1024 * 1024 / active_heads.BINS


def test_heads_are_skipped_where_that_pays() -> None:
    router = MohAttention(24, 12, 2, 4).router
    assert [router.skips(None, keys) for keys in (49, 255, 256, 4096)] == [False, False, True, True]
    assert [router.skips(wanted, 49) for wanted in (True, False)] == [True, False]
    assert not MohAttention(24, 12, 12, 0).router.skips(None, 10**6)


@pytest.mark.parametrize("cls", [MohAttention, MohCosineAttention, MohAggregatedAttention])
def test_untrained_like_routing_uses_every_active_head_alike(cls) -> None:
    module = cls(24, 6, 2, 4)
    for parameter in module.router.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(module.router(torch.randn(1, 5, 24)).gate, torch.ones(1, 5, 6))


@pytest.mark.parametrize("cls", [MohAttention, MohCosineAttention, MohAggregatedAttention, MohLlamaAttention])
class TestEveryMixture:
    def test_a_batch_is_its_samples(self, cls) -> None:
        module = randomized(cls(16, 4))
        x = torch.randn(3, 30, 16)
        alone = torch.cat([module(sample[None], (5, 6)) for sample in x])
        torch.testing.assert_close(module(x, (5, 6)), alone, atol=1e-5, rtol=1e-4)

    def test_bfloat16(self, cls) -> None:
        module = randomized(cls(16, 4)).bfloat16()
        x = torch.randn(1, 30, 16).bfloat16()
        half = module(x, (5, 6))
        assert half.dtype == torch.bfloat16
        # The same rounded weights and tokens choose the same heads.
        torch.testing.assert_close(half.float(), module.float()(x.float(), (5, 6)), atol=0.15, rtol=0.1)

    def test_wrong_input(self, cls) -> None:
        with pytest.raises(UsageError, match=r"expected \(B, N, C\) = \(B, 16, 8\)"):
            cls(8, 2)(torch.zeros(1, 15, 8), (4, 4))


def test_position_parameters_take_no_weight_decay() -> None:
    names = MohAggregatedAttention(16, 4).no_weight_decay()
    assert {"query_embedding", "temperature", "relative_pos_bias_local", "cpb_fc1.weight"} <= names
    assert "learnable_tokens" not in names


class TestLlama:
    def test_the_default_is_causal_with_grouped_keys(self) -> None:
        module = randomized(MohLlamaAttention(32, 8, num_kv_heads=2))
        x = torch.randn(2, 9, 32)
        mask = torch.full((9, 9), -1e9).triu(1)[None, None]
        torch.testing.assert_close(module(x, (9,)), module(x, (9,), mask), atol=1e-6, rtol=1e-5)
        longer = torch.cat((x, torch.randn(2, 3, 32)), dim=1)
        torch.testing.assert_close(module(longer, (12,))[:, :9], module(x, (9,)), atol=1e-5, rtol=1e-5)
        assert (module.router.shared_heads, module.router.routed_heads) == (4, 2)

    def test_all_heads_used_is_plain_attention_with_rotary_positions(self) -> None:
        module = randomized(MohLlamaAttention(16, 4, 2, 2))
        x = torch.randn(1, 7, 16)
        query, key, value = (split(part(x), 4) for part in (module.q_proj, module.k_proj, module.v_proj))
        turned = []
        for part in (query, key):
            pairs = torch.complex(part[..., :2], part[..., 2:])
            angle = torch.arange(7.0)[:, None] * 10000.0 ** -(torch.arange(2.0) / 2)
            pairs = pairs * torch.polar(torch.ones_like(angle), angle)
            turned.append(torch.cat((pairs.real, pairs.imag), dim=-1))
        logits = turned[0] @ turned[1].transpose(-1, -2) / 2
        logits = logits.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
        expected = module.o_proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(module(x, (7,)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (MohAttention, {"num_heads": 3}, "dim=16 is not a multiple of num_heads=3"),
        (MohAttention, {"num_heads": 0, "head_dim": 4}, "num_heads=0, head_dim=4; expected 1 or more"),
        (MohAttention, {"shared_heads": 5}, "shared_heads=5"),
        (MohAttention, {"shared_heads": 1, "routed_heads": 4}, "routed_heads=4 .* from 1 to the 3 others"),
        (MohCosineAttention, {"shared_heads": 2, "routed_heads": 0}, "routed_heads from 1 to the 2 others"),
        (MohCosineAttention, {"pretrained_grid": (1, 2, 3)}, "pretrained_grid="),
        (MohAggregatedAttention, {"window_size": 4}, "window_size=4.*odd window"),
        (MohAggregatedAttention, {"sr_ratio": 0}, "sr_ratio=0"),
        (MohLlamaAttention, {"num_kv_heads": 3}, "num_kv_heads=3"),
        (MohLlamaAttention, {"num_heads": 16}, "even head_dim"),
        (MohLlamaAttention, {"routed_heads": 3}, "routed_heads=3"),
    ],
)
def test_wrong_options(cls, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        cls(16, **{"num_heads": 4, **options})
