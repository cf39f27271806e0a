"""Super-token association by Triton kernels, interpreted, against the PyTorch functions in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from vislm.kernels import super_token as plain
from vislm.kernels.backends.triton import super_token as fused
from vislm.kernels.super_token_cells import CellGrid, spreads, sums

CELLS = [CellGrid(2, 3, 4, 5), CellGrid(1, 1, 2, 2), CellGrid(2, 1, 9, 8)]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def compare(
    mine: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tolerance: float = 1e-5,
) -> None:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = mine(*leaves), exact(*wide)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    found = (found, *torch.autograd.grad(found, leaves, cotangent))
    expected = (expected, *torch.autograd.grad(expected, wide, cotangent.double()))
    for number, (got, right) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            got.double(), right, rtol=tolerance, atol=tolerance, msg=lambda m, n=number: f"{n}: {m}"
        )


def tensors(cells: CellGrid, channels: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, centres and weights of two samples."""
    random = torch.Generator().manual_seed(0)
    num_cells = cells.rows * cells.columns
    num_tokens = num_cells * cells.height * cells.width
    shapes = ((2, num_tokens, channels), (2, num_cells, channels), (2, num_tokens, 9))
    tokens, centres, weights = (torch.randn(shape, generator=random) for shape in shapes)
    return tokens, centres, weights


@pytest.mark.parametrize("cells", CELLS, ids=str)
def test_association(cells: CellGrid) -> None:
    tokens, centres, _ = tensors(cells)
    grid = (cells.rows * cells.height, cells.columns * cells.width)

    def exact(x: Tensor, s: Tensor) -> Tensor:
        return plain.associate(x, s, grid, (cells.height, cells.width), scale=0.3)

    compare(lambda x, s: fused.fused_association(x, s, cells, 0.3), exact, [tokens, centres])


@pytest.mark.parametrize("cells", CELLS, ids=str)
def test_sums(cells: CellGrid) -> None:
    tokens, _, weights = tensors(cells)
    compare(lambda x, w: fused.fused_sums(x, w, cells), lambda x, w: sums(x, w, cells), [tokens, weights], 5e-5)


@pytest.mark.parametrize("cells", CELLS, ids=str)
def test_spreads(cells: CellGrid) -> None:
    _, centres, weights = tensors(cells)
    compare(lambda s, w: fused.fused_spreads(s, w, cells), lambda s, w: spreads(s, w, cells), [centres, weights], 5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sampling_and_spreading(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions through the kernels: 70 channels are two blocks of them."""
    tokens = tensors(CellGrid(2, 2, 4, 5), channels=70)[0][:1].to(dtype)

    def sampled(x: Tensor) -> Tensor:
        found = plain.sample_super_tokens(x, (8, 10), (4, 5), iterations=2)
        return plain.spread(found.tokens, found.association, (8, 10), (4, 5))

    def through_triton(x: Tensor) -> Tensor:
        with monkeypatch.context() as context:
            context.setattr(plain, "runs_triton", lambda _: True)
            return sampled(x)

    compare(through_triton, sampled, [tokens], {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype])
