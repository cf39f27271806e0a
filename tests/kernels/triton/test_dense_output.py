"""Output, log-sum-exp and gradients of the dense Triton kernels, interpreted, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vislm.errors import BackendUnavailable
from vislm.kernels import Causal, Dense, Masked, Padded, Sigmoid, StatisticsRequest, attend, attention_statistics
from vislm.kernels.backends.triton.dense import call as dense_call
from vislm.kernels.backends.triton.dense.forward import forward_kernel
from vislm.kernels.backends.triton.dense.tiles import DenseTile
from vislm.kernels.backends.triton.launching import launch

SMALL = DenseTile(rows=16, columns=32, num_warps=4, num_stages=1)


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that the tiny problems do not fit into, with different sides."""
    if "shipped_tiles" not in request.fixturenames:
        monkeypatch.setattr(dense_call, "dense_tile", lambda *_: SMALL)


@pytest.fixture
def shipped_tiles() -> None:
    """Ask for the tiles that a card would use."""


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def attended(problem: Any, backend: str, *, with_lse: bool = True) -> dict[str, Tensor]:
    """Return output, log-sum-exp and the gradients of a loss that uses both."""
    given = {"query": problem.query, "key": problem.key, "value": problem.value}
    given |= {name: entry for name, entry in problem.options.items() if isinstance(entry, Tensor)}
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
    options = problem.options | leaves
    query, key, value = (options.pop(name) for name in ("query", "key", "value"))
    output, statistics = attend(
        query, key, value, backend=backend, statistics=StatisticsRequest(lse=with_lse), **options
    )
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    loss = (output * cotangent.to(output.dtype)).sum()
    found = {"output": output}
    if with_lse:
        found["lse"] = statistics.lse
        cotangent = torch.randn(statistics.lse.shape, generator=generator, dtype=torch.float64)
        loss = loss + (statistics.lse * cotangent.to(statistics.lse.dtype))[statistics.lse.isfinite()].sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {name: tensor.detach() for name, tensor in found.items()} | dict(zip(leaves, gradients, strict=True))


def compare(problem: Any, tolerance: float = 1e-5, **options: bool) -> None:
    found = attended(problem, "triton", **options)
    exact = attended(problem.to(torch.float64), "reference", **options)
    for name, expected in exact.items():
        assert found[name].shape == expected.shape, name
        assert found[name].dtype == (torch.float32 if name == "lse" else problem.query.dtype), name
        finite = expected.isfinite()
        assert torch.equal(found[name][~finite].double(), expected[~finite]), name
        if finite.any():
            difference = (found[name].double() - expected)[finite].abs().max()
            assert difference <= tolerance * expected[finite].abs().max(), name


@pytest.mark.parametrize("tokens", [(37, 37), (17, 37), (37, 17), (1, 37)], ids=str)
@pytest.mark.parametrize(("pattern", "extras"), [("causal", False), ("padded_causal", True)])
def test_causal(pattern: str, tokens: tuple[int, int], extras: bool, make: Callable[..., Any]) -> None:
    compare(make(pattern, tokens=tokens, heads=(2, 1), dims=(24, 24), extras=extras))


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("pattern", ["dense", "padded"])
def test_not_causal(pattern: str, extras: bool, make: Callable[..., Any]) -> None:
    compare(make(pattern, tokens=(17, 37), heads=(4, 2), dims=(16, 16), extras=extras))


@pytest.mark.parametrize("dims", [(48, 24), (8, 40), (1, 1), (64, 64)], ids=str)
def test_widths(dims: tuple[int, int], make: Callable[..., Any]) -> None:
    compare(make("dense", batch=1, tokens=(17, 37), heads=(2, 1), dims=dims))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 4e-3)], ids=["bf16", "fp16"])
def test_sixteen_bits(dtype: torch.dtype, tolerance: float, make: Callable[..., Any]) -> None:
    compare(make("padded_causal", tokens=(37, 37), heads=(2, 1), dims=(24, 24), extras=True, dtype=dtype), tolerance)


@pytest.mark.usefixtures("shipped_tiles")
def test_shipped_tiles(make: Callable[..., Any]) -> None:
    options = {"tokens": (130, 140), "heads": (1, 1), "dims": (48, 48), "extras": True, "dtype": torch.bfloat16}
    compare(make("padded_causal", batch=1, **options), 0.03)


@pytest.mark.parametrize("shape", [(2, 2, 17, 37), (2, 1, 17, 37), (17, 1), (2, 1, 1, 37)], ids=str)
def test_a_bias_is_not_repeated(shape: tuple[int, ...], make: Callable[..., Any]) -> None:
    """Shared biases stay shared; their gradient is the sum over those that share them."""
    problem = make("dense", tokens=(17, 37), heads=(2, 2), dims=(16, 16))
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    compare(replace(problem, options=problem.options | {"bias": bias.float()}))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(scale: float, make: Callable[..., Any]) -> None:
    problem = make("causal", batch=1, tokens=(17, 17), heads=(1, 1), dims=(16, 16))
    compare(replace(problem, options=problem.options | {"scale": scale}))


@pytest.mark.parametrize(
    "normalize", [Sigmoid(bias=-1.0, temperature=0.3, row_norm="length"), Sigmoid(row_norm="sqrt_length")]
)
def test_sigmoid(normalize: Sigmoid, make: Callable[..., Any]) -> None:
    problem = make("padded_causal", tokens=(37, 37), heads=(2, 1), dims=(16, 16), extras=True)
    compare(replace(problem, options=problem.options | {"normalize": normalize}), with_lse=False)


def test_large_logits_and_hidden_rows(make: Callable[..., Any]) -> None:
    """Logits of +-1000 overflow nothing; a row of ``-inf`` bias gives zeros and no gradient."""
    problem = make("dense", batch=1, tokens=(17, 37), heads=(1, 1), dims=(16, 16))
    bias = torch.zeros(17, 37)
    bias[3], bias[5, :36], bias[7, 4], bias[9] = -torch.inf, -torch.inf, 1000.0, -1000.0
    compare(replace(problem, options=problem.options | {"bias": bias}), 2e-4)  # float32 has 7 digits, so has 1000


def test_strides(make: Callable[..., Any]) -> None:
    """Tensors as projections leave them, (B, N, H, D), are read in place, and gradients come in the same layout."""
    problem = make("causal", tokens=(17, 37), heads=(2, 2), dims=(16, 16))
    tokens_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in problem.tensors]
    channels_first = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in problem.tensors]
    expected = attend(*problem.tensors, backend="triton", **problem.options)
    for tensors in (tokens_first, channels_first):
        assert torch.equal(attend(*tensors, backend="triton", **problem.options), expected)
    leaves = [tensor.detach().requires_grad_() for tensor in tokens_first]
    gradients = torch.autograd.grad(attend(*leaves, backend="triton", **problem.options).sum(), leaves)
    assert [gradient.stride() for gradient in gradients] == [leaf.stride() for leaf in leaves]


@pytest.mark.parametrize(("batch", "num_queries", "num_keys"), [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_nothing(batch: int, num_queries: int, num_keys: int) -> None:
    query, key = torch.ones(batch, 2, num_queries, 16), torch.ones(batch, 2, num_keys, 16)
    leaves = [tensor.requires_grad_() for tensor in (query, key, key.clone())]
    output, statistics = attend(*leaves, backend="triton", statistics=StatisticsRequest(lse=True))
    assert torch.equal(output, torch.zeros(batch, 2, num_queries, 16))
    assert torch.equal(statistics.lse, torch.full((batch, 2, num_queries), -torch.inf))
    assert all(gradient.abs().sum() == 0 for gradient in torch.autograd.grad(output.sum(), leaves))


def test_repeats_bit_for_bit(make: Callable[..., Any]) -> None:
    problem = make("causal", tokens=(37, 37), heads=(2, 1), dims=(16, 16), extras=True)
    first, second = attended(problem, "triton"), attended(problem, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_the_gradients_asked_for(make: Callable[..., Any]) -> None:
    problem = make("dense", batch=1, tokens=(17, 17), heads=(1, 1), dims=(16, 16))
    everything = attended(problem, "triton", with_lse=False)
    for index, name in enumerate(("query", "key", "value")):
        tensors = [tensor.detach().clone() for tensor in problem.tensors]
        tensors[index].requires_grad_()
        generator = torch.Generator().manual_seed(1)
        output = attend(*tensors, backend="triton", **problem.options)
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).float()
        (gradient,) = torch.autograd.grad((output * cotangent).sum(), [tensors[index]])
        assert torch.equal(gradient, everything[name])


def test_lse_alone_has_gradients() -> None:
    """Without a value there is no output, but the log-sum-exp still teaches query and key."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 17, 16, generator=generator).requires_grad_() for _ in range(2))
    wanted = StatisticsRequest(lse=True)
    found = {}
    for backend in ("triton", "reference"):
        lse = attention_statistics(query, key, request=wanted, backend=backend).lse
        found[backend] = torch.autograd.grad(lse.square().sum(), [query, key])
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-4, atol=1e-5)


def test_a_launch_has_no_unknown_arguments() -> None:
    """The interpreter would drop them, the compiler's launcher would not."""
    with pytest.raises(TypeError, match=r"forward_kernel has no parameters \['nonsense'\]"):
        launch(forward_kernel, 1, {"nonsense": 1}, 4, 1)


def refused(pattern: Any, **options: Any) -> str:
    query = torch.zeros(2, 2, 5, options.pop("width", 16), dtype=options.pop("dtype", torch.float32))
    query.requires_grad_(options.pop("trained", False))
    with pytest.raises(BackendUnavailable) as error:
        attend(query, query, query, pattern=pattern, backend="triton", **options)
    return str(error.value)


def test_reasons() -> None:
    assert "float64" in refused(Dense(), dtype=torch.float64)
    assert "logits are float64" in refused(Dense(), bias=torch.zeros(5, 5, dtype=torch.float64))
    assert "up to 256, this is 272" in refused(Dense(), width=272)
    assert "pattern Masked" in refused(Masked(torch.ones(5, 5, dtype=torch.bool)))
    assert "float32 gradients for head_dim up to 128, this is 160" in refused(Dense(), width=160, trained=True)
    wanted = StatisticsRequest(entropy=True, received=True, lse=True)
    assert "no gradients of received, entropy;" in refused(Causal(), trained=True, statistics=wanted)
    valid = torch.ones(2, 5, dtype=torch.bool)
    assert "no gradients of mass" in refused(Padded(valid), trained=True, statistics=StatisticsRequest(mass={}))
