"""Gradients of the output and of the statistics, against float64 autograd and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vislm.kernels import StatisticsRequest, attend, merge

PATTERNS = ("dense", "causal", "padded", "padded_causal", "masked")
INPUTS = ("query", "key", "value", "bias", "key_logits")


def leaves(problem) -> dict[str, Tensor]:
    tensors = dict(zip(INPUTS, (*problem.tensors, problem.options["bias"], problem.options["key_logits"]), strict=True))
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def gradients(problem, cotangent: Tensor, backend: str) -> dict[str, Tensor]:
    inputs = leaves(problem)
    options = problem.options | {name: inputs[name] for name in ("bias", "key_logits")}
    output = attend(inputs["query"], inputs["key"], inputs["value"], backend=backend, **options)
    found = torch.autograd.grad(output, list(inputs.values()), cotangent.to(output.dtype))
    return dict(zip(inputs, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [(63, 63), (17, 63)], ids=["self", "cross"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_output(backend, pattern, tokens, dtype, make, plain) -> None:
    problem = make(pattern, tokens=tokens, extras=True, dtype=dtype)
    cotangent = torch.randn(problem.query.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = gradients(problem.to(torch.float64), cotangent, "reference")
    for name, found in gradients(problem, cotangent, backend).items():
        assert found.dtype == dtype
        exact = expected[name]
        worst = (found.double() - exact).abs().max() / exact.abs().max()
        assert worst < (1e-5 if dtype == torch.float32 else 0.03), name


@pytest.mark.parametrize("pattern", ["dense", "causal"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_fused_call(backend, pattern, make, plain) -> None:
    """Without bias the torch backend takes its fused path, whose gradient is the kernel's own."""
    problem = make(pattern)
    cotangent = torch.randn(problem.query.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def of(problem, cotangent, run):
        inputs = [tensor.detach().requires_grad_() for tensor in problem.tensors]
        return torch.autograd.grad(run(inputs), inputs, cotangent.to(inputs[0].dtype))

    found = of(problem, cotangent, lambda inputs: attend(*inputs, backend=backend, **problem.options))
    exact = of(problem.to(torch.float64), cotangent, lambda x: attend(*x, backend="reference", **problem.options))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_finite_differences(backend, pattern, make) -> None:
    """Also of the statistics, and with queries that see nothing: zero gradients there, not NaN."""
    problem = make(pattern, tokens=(5, 6), heads=(2, 1), dims=(3, 4), extras=True, dtype=torch.float64)
    inputs = leaves(problem)
    allowed = torch.tensor([True, True, False, True, True])
    wanted = StatisticsRequest(
        lse=True, rows=(0, -1), received=allowed, mass={"half": torch.arange(6) < 3}, entropy=True, output_norm=True
    )

    def every(query, key, value, bias, key_logits):
        options = problem.options | {"bias": bias, "key_logits": key_logits}
        output, found = attend(query, key, value, statistics=wanted, backend=backend, **options)
        lse = found.lse.masked_fill(found.lse.isinf(), 0.0)
        return output, lse, found.rows, found.received, found.mass["half"], found.entropy, found.output_norm

    assert torch.autograd.gradcheck(every, tuple(inputs.values()))


@pytest.mark.parametrize("extras", [False, True], ids=["bool_mask", "float_mask"])
def test_kernels_that_give_nan_for_unseeing_queries(extras, make, monkeypatch) -> None:
    """Some kernels divide 0 by 0 there; neither the output nor any gradient may show it."""

    def naive(query, key, value, attn_mask, scale):
        logits = query @ key.mT * scale
        hidden = attn_mask.logical_not() if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
        bias = 0.0 if attn_mask.dtype == torch.bool else attn_mask
        return torch.softmax((logits + bias).masked_fill(hidden, -torch.inf), -1) @ value

    problem = make("masked", extras=extras)
    inputs = [tensor.detach().requires_grad_() for tensor in problem.tensors]
    expected = attend(*inputs, backend="reference", **problem.options)
    monkeypatch.setattr("vislm.kernels.fused.scaled_dot_product_attention", naive)
    output = attend(*inputs, backend="torch", **problem.options)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for gradient in torch.autograd.grad(output.sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_head_scale_and_received_queries(backend, make) -> None:
    problem = make("padded_causal", tokens=(5, 6), heads=(2, 1), dims=(3, 4), dtype=torch.float64)
    query, key, value = (tensor.requires_grad_() for tensor in problem.tensors)
    factors = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    wanted = StatisticsRequest(received=torch.tensor([0, 3, 3]), maximum=True)

    def every(query, key, value, factors):
        options = problem.options | {"head_scale": factors, "statistics": wanted, "backend": backend}
        output, found = attend(query, key, value, **options)
        return output, found.received, found.maximum

    assert torch.autograd.gradcheck(every, (query, key, value, factors))


def test_merge(make) -> None:
    """Through weights, outputs and lse; a part that a query does not see has zero gradients."""
    problem = make("padded_causal", tokens=(5, 6), heads=(2, 1), dims=(3, 4), dtype=torch.float64)
    query, key, value = (tensor.requires_grad_() for tensor in problem.tensors)
    weight = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def joined(query, key, value, weight):
        wanted = StatisticsRequest(lse=True)
        parts = [
            (part.output, part.statistics.lse)
            for part in (
                attend(query, key, value, statistics=wanted, **problem.options),
                attend(query, key[:, :, :3], value[:, :, :3], statistics=wanted),
            )
        ]
        return merge(parts, [weight, 1.0])

    assert torch.autograd.gradcheck(joined, (query, key, value, weight))
