"""Routers of tokens to heads: ties, precision, the load-balance loss and its collection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from vislm.attention import MohAttention
from vislm.attention.head_routing import HeadRouter, QueryNormRouter, head_routings, load_balance_losses
from vislm.errors import UsageError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@given(
    heads=st.integers(2, 9), batch=st.integers(1, 3), tokens=st.integers(1, 12), seed=st.integers(0, 99), data=st.data()
)
def test_gates_and_choices(heads, batch, tokens, seed, data) -> None:
    shared = data.draw(st.integers(0, heads - 1))
    routed = data.draw(st.integers(1, heads - shared))
    torch.manual_seed(seed)
    routing = HeadRouter(6, heads, shared, routed)(torch.randn(batch, tokens, 6))
    active = routing.active()
    assert bool((active.sum(dim=-1) == shared + routed).all())
    assert bool(((routing.gate > 0) == active).all())
    # Each group's gates add up to its weight times its heads; the weights of the two add up to 2.
    sums = routing.gate[..., :shared].sum(-1), routing.gate[..., shared:].sum(-1)
    total = sums[0] / shared + sums[1] / routed if shared else sums[1] / routed * 2
    torch.testing.assert_close(total, torch.full((batch, tokens), 2.0))
    loss = routing.load_balance_loss()
    assert 0 < loss.item() <= heads - shared + 1e-5


def test_of_equal_scores_the_first_heads_win() -> None:
    router = HeadRouter(4, 6, 2, 2)
    kept = router(torch.zeros(1, 3, 4)).kept
    assert kept.tolist() == [[[True, True, False, False]] * 3]


def test_routing_is_computed_in_float32() -> None:
    router, x = HeadRouter(64, 8, 2, 3), torch.randn(2, 50, 64)
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = router(x)
    torch.testing.assert_close(under_autocast.gate, expected.gate, rtol=0, atol=0)
    half = router.bfloat16()(x.bfloat16())
    wide = router.float()(x.bfloat16().float())
    assert half.gate.dtype == torch.float32
    torch.testing.assert_close(half.gate, wide.gate, rtol=0, atol=0)
    assert router.double()(x.double()).gate.dtype == torch.float64


def test_the_loss_of_even_routing_is_the_number_of_routed_heads() -> None:
    router = HeadRouter(4, 4, 0, 2)
    with torch.no_grad():
        router.wg.weight.copy_(1e-6 * torch.eye(4))
    even = torch.eye(4) + torch.eye(4).roll(1, dims=0)
    assert router(even[None]).load_balance_loss().item() == pytest.approx(2.0, abs=1e-4)
    router.wg.weight.data.mul_(1e7)
    assert router(even[None, :1].expand(1, 4, 4)).load_balance_loss().item() == pytest.approx(4.0, abs=1e-3)


def test_padding_does_not_count() -> None:
    router, x = HeadRouter(8, 6, 2, 2), torch.randn(2, 10, 8)
    valid = torch.arange(10)[None] < torch.tensor([[10], [4]])
    loss = router(x).load_balance_loss(valid)
    rows = torch.cat((x[0], x[1, :4]))[None]
    torch.testing.assert_close(loss, router(rows).load_balance_loss())
    assert loss.item() != pytest.approx(router(x).load_balance_loss().item(), rel=1e-4)


def test_without_routed_heads_there_is_no_loss() -> None:
    routing = HeadRouter(8, 4, 4, 0)(torch.randn(1, 3, 8))
    assert bool(routing.active().all())
    with pytest.raises(UsageError, match="without routed heads"):
        routing.load_balance_loss()
    with pytest.raises(UsageError, match="no routings; collect them"):
        load_balance_losses([])


def test_one_shared_head_alone_has_the_gate_one() -> None:
    routing = HeadRouter(8, 1, 1, 0)(torch.randn(1, 3, 8))
    assert routing.gate.tolist() == [[[1.0]] * 3]


def network() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([MohAttention(8, 4, 1, 2), MohAttention(8, 4, 4, 0), MohAttention(8, 4, 2, 1)])


def run(layers: nn.ModuleList, x: torch.Tensor, recompute: bool = False) -> torch.Tensor:
    for layer in layers:
        x = x + (checkpoint(layer, x, (3, 3), use_reentrant=False) if recompute else layer(x, (3, 3)))
    return x


def test_losses_are_collected_in_order_and_never_twice() -> None:
    layers, x = network(), torch.randn(2, 9, 8)
    with head_routings(layers) as routings:
        run(layers, x)
    seen = [x]
    for layer in layers:
        seen.append(seen[-1] + layer(seen[-1], (3, 3)))
    expected = [layers[i].router(seen[i]).load_balance_loss() for i in (0, 2)]
    torch.testing.assert_close(load_balance_losses(routings), torch.stack(expected))
    run(layers, x)
    assert len(routings) == 2
    with head_routings(layers) as again:
        run(layers, x)
    assert len(again) == 2


def test_losses_under_activation_checkpointing() -> None:
    layers, x = network(), torch.randn(2, 9, 8)
    gradients = []
    for recompute in (False, True):
        layers.zero_grad()
        with head_routings(layers) as routings:
            y = run(layers, x, recompute)
            (y.square().mean() + 0.01 * load_balance_losses(routings).mean()).backward()
        assert len(routings) == 2
        gradients.append([parameter.grad for parameter in layers.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert all(gradient is not None for gradient in gradients[1])


def test_hooks_go_after_an_error() -> None:
    layers = network()
    with pytest.raises(UsageError), head_routings(layers):
        layers[0](torch.randn(1, 2, 8), (3, 3))
    assert not any(module._forward_hooks for module in layers.modules())


class TestQueryNorms:
    def test_the_longest_queries_are_kept_and_gates_are_binary(self) -> None:
        query = torch.randn(2, 6, 5, 4)
        routing = QueryNormRouter(2, 2)(query)
        assert set(routing.gate.unique().tolist()) == {0.0, 1.0}
        norms = query[:, 2:].norm(dim=-1).transpose(1, 2)
        least = norms.masked_fill(~routing.kept, torch.inf).amin(-1)
        assert bool((norms.masked_fill(routing.kept, 0.0).amax(-1) < least).all())

    @pytest.mark.parametrize(("shared", "routed"), [(3, 1), (4, 0), (0, 4)])
    def test_few_or_no_routed_heads(self, shared, routed) -> None:
        routing = QueryNormRouter(shared, routed)(torch.randn(2, 4, 5, 6, requires_grad=True))
        torch.testing.assert_close(routing.gate, torch.ones(2, 5, 4))

    def test_gradients_of_the_gates_reach_the_norms(self) -> None:
        query = torch.randn(1, 4, 3, 4, requires_grad=True)
        upstream = torch.randn(1, 3, 4)
        routing = QueryNormRouter(2, 1)(query)
        (through,) = torch.autograd.grad((routing.gate * upstream).sum(), query, retain_graph=True)
        (straight,) = torch.autograd.grad((routing.probabilities * upstream[..., 2:]).sum(), query)
        torch.testing.assert_close(through, straight)
        assert through.abs().sum().item() > 0

    def test_its_loss_is_collected_too(self) -> None:
        router = QueryNormRouter(1, 1)
        with head_routings(router) as routings:
            routing = router(torch.randn(1, 3, 5, 4))
        assert load_balance_losses(routings).tolist() == [routing.load_balance_loss().item()]
