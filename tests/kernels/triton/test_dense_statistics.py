"""Statistics of the dense Triton kernels, interpreted, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vislm.kernels import Sigmoid, StatisticsRequest, attend, attention_statistics
from vislm.kernels.backends.triton.dense import call as dense_call
from vislm.kernels.backends.triton.dense.tiles import DenseTile


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_call, "dense_tile", lambda *_: DenseTile(rows=16, columns=32, num_warps=4, num_stages=1))


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def compare(problem: Any, wanted: StatisticsRequest, flatten: Callable[[Any], dict[str, Tensor]]) -> None:
    exact = problem.to(torch.float64)
    found, expected = (
        attend(*given.tensors, statistics=wanted, backend=backend, **given.options).statistics
        for given, backend in ((problem, "triton"), (exact, "reference"))
    )
    assert found.weights == expected.weights
    mine, theirs = flatten(found), flatten(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == torch.float32, name
        torch.testing.assert_close(mine[name].double(), tensor, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize(("tokens", "extras"), [((37, 37), True), ((37, 17), False)])
@pytest.mark.parametrize("pattern", ["dense", "causal", "padded", "padded_causal"])
def test_all(pattern, tokens, extras, make, everything, flatten) -> None:
    problem = make(pattern, tokens=tokens, heads=(2, 1), dims=(24, 24), extras=extras)
    compare(problem, everything(2, *tokens), flatten)


def test_bf16_statistics_are_exact_for_the_rounded_inputs(make, everything, flatten) -> None:
    problem = make("padded_causal", tokens=(37, 37), heads=(2, 1), dims=(16, 16), dtype=torch.bfloat16)
    compare(problem, replace(everything(2, 37, 37), output_norm=False), flatten)


@pytest.mark.parametrize("normalize", [Sigmoid(), Sigmoid(bias=-1.0, temperature=0.3, row_norm="length")])
def test_sigmoid(normalize, make, everything, flatten) -> None:
    problem = make("padded_causal", tokens=(37, 37), heads=(2, 1), dims=(16, 16), extras=True)
    wanted = replace(everything(2, 37, 37), lse=False)
    compare(replace(problem, options=problem.options | {"normalize": normalize}), wanted, flatten)


@pytest.mark.parametrize("normalize", ["softmax", Sigmoid(row_norm="sqrt_length")], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "received",
    [torch.tensor([3, 3, -1]), torch.tensor([[0, 1], [2, 2]]), torch.arange(17) % 2 == 0, torch.rand(2, 17) < 0.3],
    ids=["indices", "indices per sample", "mask", "mask per sample"],
)
def test_received_from_chosen_queries(received, normalize, make, flatten) -> None:
    problem = make("causal", tokens=(17, 37), heads=(2, 1), dims=(16, 16))
    problem = replace(problem, options=problem.options | {"normalize": normalize})
    compare(problem, StatisticsRequest(received=received), flatten)


def test_more_key_groups_than_one_pass_takes(make, flatten) -> None:
    groups = {f"group {index}": torch.arange(37) % 11 == index for index in range(11)}
    problem = make("dense", batch=1, tokens=(17, 37), heads=(1, 1), dims=(16, 16))
    compare(problem, StatisticsRequest(mass=groups, maximum=True), flatten)
    assert attend(*problem.tensors, statistics=StatisticsRequest(mass={}), backend="triton").statistics.mass == {}


def test_without_a_value(make, flatten) -> None:
    problem = make("causal", tokens=(17, 37), heads=(2, 1), dims=(16, 16))
    for wanted in (StatisticsRequest(rows=(0, -1)), StatisticsRequest(received=True, lse=True)):
        found, expected = (
            flatten(
                attention_statistics(problem.query, problem.key, request=wanted, backend=backend, **problem.options)
            )
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_rows_and_output_norm_have_gradients(make) -> None:
    problem = make("causal", tokens=(17, 37), heads=(2, 1), dims=(16, 16))
    gradients = {}
    for backend in ("triton", "reference"):
        leaves = [tensor.detach().requires_grad_() for tensor in problem.tensors]
        wanted = StatisticsRequest(rows=(3, -1), received=torch.tensor([0, 5]), output_norm=True)
        statistics = attend(*leaves, statistics=wanted, backend=backend, **problem.options).statistics
        loss = statistics.rows.square().sum() + statistics.received.square().sum() + statistics.output_norm.sum()
        gradients[backend] = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(gradients["triton"], gradients["reference"], rtol=1e-4, atol=1e-5)


def test_nothing_to_measure() -> None:
    query, key = torch.ones(1, 2, 3, 16), torch.ones(1, 2, 0, 16)
    wanted = StatisticsRequest(received=True, entropy=True, maximum=True, mass={"all": torch.ones(0, dtype=torch.bool)})
    found = attend(query, key, key, statistics=wanted, backend="triton").statistics
    assert found.received.shape == (1, 2, 0)
    for tensor in (found.entropy, found.maximum, found.mass["all"]):
        assert torch.equal(tensor, torch.zeros(1, 2, 3))
