"""Gathering and merging by Triton kernels, interpreted, against the PyTorch functions in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from vislm.kernels import tokens as plain
from vislm.kernels.backends.triton import tokens as fused

Function = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def compare(mine: Function, exact: Function, inputs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """Output and all gradients agree, and have the dtype of the first input and of their own."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = mine(*leaves), exact(*wide)
    assert found.dtype == inputs[0].dtype
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    found = (found, *torch.autograd.grad(found, leaves, cotangent))
    expected = (expected, *torch.autograd.grad(expected, wide, cotangent.double()))
    for number, (got, right) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            got.double(), right, rtol=tolerance, atol=tolerance, msg=lambda m, n=number: f"{n}: {m}"
        )


@pytest.fixture
def tokens() -> Tensor:
    """Tokens (2, 11, 300) behind a class token that does not belong to them: not contiguous, two blocks of channels."""
    return torch.randn(2, 12, 300, generator=torch.Generator().manual_seed(0))[:, 1:]


def index(size: int, length: int = 11) -> Tensor:
    return torch.randint(size, (2, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_gather(tokens: Tensor, dtype: torch.dtype) -> None:
    chosen = index(11, 20).to(dtype)
    compare(lambda x: fused.fused_gather(x, chosen), lambda x: plain.gather_tokens(x, chosen), [tokens])


def test_scatter(tokens: Tensor) -> None:
    goes = index(30)
    compare(lambda x: fused.fused_combine(x, None, goes, 30), lambda x: plain.scatter_tokens(x, goes, 30), [tokens])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_merge(tokens: Tensor, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    goes = index(4)
    goes[0] = 3  # more tokens than a block of rows go to one place, and none to the others
    sizes = torch.rand(2, 11, generator=torch.Generator().manual_seed(3)) + 0.5

    def merged(x: Tensor, s: Tensor) -> Tensor:
        return plain.merge_tokens(x, goes, 4, s).tokens

    def through_triton(x: Tensor, s: Tensor) -> Tensor:
        with monkeypatch.context() as context:
            context.setattr(plain, "runs_triton", lambda _: True)
            return merged(x, s)

    compare(through_triton, merged, [tokens.to(dtype), sizes], tolerance)


def test_indices_outside_give_zeros_and_no_gradient(tokens: Tensor) -> None:
    leaf = tokens.detach().requires_grad_()
    found = fused.fused_gather(leaf, torch.tensor([[0, -1], [11, 10**9]]))
    assert torch.equal(found[0, 0], leaf[0, 0])
    assert (found[0, 1] == 0).all()
    assert (found[1] == 0).all()
    (grad,) = torch.autograd.grad(found.sum(), leaf)
    assert math.isclose(float(grad.sum()), 300)
    assert (grad[0, 0] == 1).all()


def test_nothing_to_gather_or_to_merge(tokens: Tensor) -> None:
    none = torch.zeros(2, 0, dtype=torch.long)
    assert fused.fused_gather(tokens, none).shape == (2, 0, 300)
    assert (fused.fused_combine(tokens[:, :0], None, none, 3) == torch.zeros(2, 3, 300)).all()
