"""Sigmoid attention against its formula in float64, its properties, its state dict, its errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vislm.attention.sigmoid import SigmoidAttention, SigmoidCrossAttention
from vislm.attention.sigmoid_block import SigmoidBlock
from vislm.errors import UnknownName, UsageError
from vislm.kernels import Causal, Masked, Padded, StatisticsRequest
from vislm.kernels.factors import alibi_slopes


def _random(module: nn.Module, seed: int = 0) -> Any:
    """Give every parameter weights that matter."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith(("attn_bias", "attn_temp")):
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.4)
    return module.double()


def _input(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _formula(module: SigmoidAttention, x: Tensor, allowed: Tensor, bias: Any, temperature: Any) -> Tensor:
    """Return what the paper's equations give, written with a loop over heads and the whole matrix."""
    tokens, dim = x.shape[1], module.head_dim
    query, key, value = module.qkv(x).chunk(3, dim=-1)
    offset = torch.arange(tokens)[None] - torch.arange(tokens)[:, None]
    heads = []
    for head in range(module.num_heads):
        q, k, v = (part[..., head * dim : (head + 1) * dim] for part in (query, key, value))
        q, k = module.q_norm(q), module.k_norm(k)
        if module.rope:
            q, k = _turned(q), _turned(k)
        logits = q @ k.transpose(-1, -2) / math.sqrt(dim)
        if module.alibi:
            logits = logits + alibi_slopes(module.num_heads)[head].double() * offset
        weights = torch.sigmoid(logits * math.e**temperature + bias) * allowed
        if module.row_norm is not None:
            weights = weights / torch.arange(1, tokens + 1)[:, None] ** (1.0 if module.row_norm == "length" else 0.5)
        heads.append(weights @ v)
    return module.proj(torch.cat(heads, dim=-1))


def _turned(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    angle = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


@given(
    tokens=st.integers(1, 13),
    num_heads=st.sampled_from([1, 2, 6]),
    options=st.fixed_dictionaries(
        {
            "qkv_bias": st.booleans(),
            "qk_norm": st.booleans(),
            "rope": st.booleans(),
            "alibi": st.booleans(),
            "row_norm": st.sampled_from([None, "length", "sqrt_length"]),
            "proj_bias": st.booleans(),
            "temperature": st.sampled_from([0.0, 0.3, -1.0]),
            "bias": st.sampled_from([0.0, -2.5]),
            "trainable": st.booleans(),
        }
    ),
    causal=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_output_is_the_formula(tokens, num_heads, options, causal) -> None:
    module = _random(SigmoidAttention(24, num_heads, **options))
    x = _input(2, tokens, 24)
    allowed = torch.rand(2, tokens, tokens, generator=torch.Generator().manual_seed(2)) < 0.7
    if causal:
        allowed = allowed & torch.ones(tokens, tokens).tril().bool()
    expected = _formula(module, x, allowed, options["bias"], options["temperature"])
    torch.testing.assert_close(module(x, pattern=Masked(allowed[:, None])), expected, rtol=1e-5, atol=1e-5)


def test_statistics_are_those_of_the_weights() -> None:
    module = _random(SigmoidAttention(16, 2, n_train=9))
    x = _input(2, 9, 16)
    output, statistics = module(x, (3, 3), statistics=StatisticsRequest(rows=range(9), received=True))
    query, key, value = (module.heads(part) for part in module.qkv(x).chunk(3, -1))
    weights = torch.sigmoid(query @ key.transpose(-1, -2) / math.sqrt(8) - math.log(9))
    torch.testing.assert_close(statistics.rows, weights)
    torch.testing.assert_close(statistics.received, weights.sum(-2))
    torch.testing.assert_close(output, module.proj((weights @ value).transpose(1, 2).flatten(2)))
    assert statistics.weights == "unnormalised"


def test_bias_and_temperature_learn_if_wanted() -> None:
    module = _random(SigmoidAttention(16, 2, bias=-1.0, temperature=0.2, trainable=True, alibi=True))
    x, allowed = _input(2, 7, 16), torch.ones(7, 7, dtype=torch.bool)
    scalars = module.attn_bias, module.attn_temp
    assert {name for name, _ in module.named_parameters()} >= {"attn_bias", "attn_temp"}
    ours = torch.autograd.grad(module(x).square().sum(), scalars)
    expected = torch.autograd.grad(_formula(module, x, allowed, *scalars).square().sum(), scalars)
    for mine, theirs in zip(ours, expected, strict=True):
        assert theirs.abs() > 0.01
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_key_counts_for_itself_only() -> None:
    module = _random(SigmoidCrossAttention(16, 2, n_train=8))
    module.proj = nn.Identity()
    x, context = _input(2, 5, 16), _input(2, 8, 16, seed=3)
    parts = module(x, context[:, :3]) + module(x, context[:, 3:])
    torch.testing.assert_close(module(x, context), parts)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(module(x, context[:, order]), module(x, context))


def test_padding_changes_nothing_with_a_frozen_bias() -> None:
    module = _random(SigmoidAttention(16, 2, n_train=6))
    x = _input(1, 6, 16)
    padded = torch.cat([x, 1e3 * _input(1, 3, 16)], dim=1)
    valid = torch.arange(9)[None] < 6
    torch.testing.assert_close(module(padded, pattern=Padded(valid))[:, :6], module(x))


def test_a_query_that_sees_nothing_gives_zero() -> None:
    module = _random(SigmoidAttention(16, 2, n_train=4, proj_bias=False))
    allowed = torch.ones(4, 4, dtype=torch.bool)
    allowed[2] = False
    output = module(_input(2, 4, 16), pattern=Masked(allowed))
    assert (output[:, 2] == 0).all()
    assert (output[:, :2] != 0).any()


def test_the_future_does_not_leak() -> None:
    module = _random(SigmoidAttention(16, 2, n_train=6, qk_norm=True, rope=True, alibi=True))
    x = _input(1, 6, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x, pattern=Causal())[:, 3].sum(), x)
    assert (gradient[:, 4:] == 0).all()
    assert (gradient[:, :4] != 0).any()


@pytest.mark.parametrize(("bias", "mass"), [("-log_n", 0.5), ("-log_n_current", 1.0)])
def test_row_mass_after_half_of_the_tokens_is_pruned(bias, mass) -> None:
    module = SigmoidAttention(16, 2, bias=bias, n_train=200)
    with torch.no_grad():
        module.qkv.weight.zero_()
    group = StatisticsRequest(mass={"all": torch.ones(100, dtype=torch.bool)})
    _, statistics = module(torch.randn(1, 100, 16), statistics=group)
    assert statistics.mass["all"].mean().item() == pytest.approx(mass, rel=0.02)


def test_the_state_dict_has_the_official_names() -> None:
    module = SigmoidAttention(16, 2, qk_norm=True, n_train=17, temperature=0.3)
    names = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "attn_bias", "attn_temp"}
    names |= {f"{n}_norm.{p}" for n in "qk" for p in ("weight", "bias")}
    state = module.state_dict()
    assert set(state) == names
    assert state["attn_bias"].tolist() == pytest.approx([-math.log(17)])
    other = SigmoidAttention(16, 2, qk_norm=True, bias=0.0)
    other.load_state_dict(state)
    assert other.attn_bias == pytest.approx(-math.log(17))
    assert other.attn_temp == pytest.approx(0.3)
    x = torch.randn(1, 5, 16)
    for twin in (other, copy.deepcopy(module)):
        torch.testing.assert_close(twin(x), module(x))
    cross = {"q_proj", "kv_proj", "proj", "v_norm", "attn_bias", "attn_temp"}
    assert {name.split(".")[0] for name in SigmoidCrossAttention(16, 2, n_train=4).state_dict()} == cross


def test_a_bias_that_follows_the_length_is_not_overwritten_by_a_checkpoint() -> None:
    module = SigmoidAttention(16, 2, bias="-log_n_current")
    assert "attn_bias" not in module.state_dict()
    module.load_state_dict(SigmoidAttention(16, 2, bias=-7.62, temperature=0.5).state_dict())
    assert module.attn_bias is None
    assert module.attn_temp == 0.5
    learning = SigmoidAttention(16, 2, bias=0.0, trainable=True)
    learning.load_state_dict(SigmoidAttention(16, 2, bias=-7.5).state_dict())
    assert learning.attn_bias.tolist() == [-7.5]


def test_a_softmax_checkpoint_loads_without_scalars() -> None:
    module = SigmoidAttention(16, 2, n_train=4)
    state = {k: v for k, v in module.state_dict().items() if not k.startswith("attn_")}
    module.load_state_dict(state)
    assert module.attn_bias == pytest.approx(-math.log(4))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "rope": True}, {"alibi": True, "temperature": 0.2}])
def test_bfloat16_stays_close(options) -> None:
    module = _random(SigmoidAttention(32, 4, n_train=50, **options))
    x = _input(2, 50, 32)
    exact = module(x)
    low = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low - exact).norm() / exact.norm() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        cast = module.float()(x.float())
    assert (cast - exact).norm() / exact.norm() < 0.03


def test_a_block_starts_near_the_identity_and_has_the_official_names() -> None:
    block = SigmoidBlock(24, 3, mlp_hidden=48, qk_norm=True, n_train=7)
    x = torch.randn(2, 7, 24)
    assert 0 < (block(x) - x).abs().max() < 1e-3
    parts = {name.rsplit(".", 1)[0] for name in block.state_dict()}
    assert parts == {
        *("norm1", "norm2", "ls1", "ls2", "mlp.fc1", "mlp.fc2"),
        *("attn", "attn.qkv", "attn.proj", "attn.q_norm", "attn.k_norm"),
    }
    assert "mlp.fc1.bias" not in block.state_dict()


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_attention_branch_may_be_normalised(norm) -> None:
    block = _random(SigmoidBlock(24, 3, layer_scale=None, post_attn_norm=norm, n_train=7))
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.zero_()
        block.post_attn_norm.weight.fill_(2.0)
        if norm == "layer":
            block.post_attn_norm.bias.zero_()
    x = _input(2, 7, 24)
    branch = block(x) - x
    torch.testing.assert_close(branch.square().mean(-1), torch.full((2, 7), 4.0).double(), rtol=1e-3, atol=1e-3)
    assert not {"ls1.gamma", "ls2.gamma"} & set(block.state_dict())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SigmoidAttention(16, 3, n_train=4), "dim=16 is not a multiple of num_heads=3"),
        (lambda: SigmoidAttention(16, 2), "n_train=None.*-log_n_current"),
        (lambda: SigmoidAttention(16, 2, n_train=0), "n_train=0"),
        (lambda: SigmoidAttention(6, 2, n_train=4, rope=True), "head_dim = 6 / 2 is odd"),
    ],
)
def test_bad_sizes_are_named(build, message) -> None:
    with pytest.raises(UsageError, match=message):
        build()


def test_bad_names_are_named() -> None:
    with pytest.raises(UnknownName, match="did you mean '-log_n"):
        SigmoidAttention(16, 2, bias="log_n")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnknownName, match="'rms'"):
        SigmoidBlock(16, 2, post_attn_norm="rmsnorm", n_train=4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnknownName, match="sqrt_length"):
        SigmoidAttention(16, 2, row_norm="sqrt", n_train=4)  # pyright: ignore[reportArgumentType]
