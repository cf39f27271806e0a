"""Cosine, class token and decomposed relative position against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vislm.errors import UsageError
from vislm.kernels.factors import (
    class_token_bias,
    cosine_bias,
    decomposed_position_bias,
    resize_position_table,
)


def test_cosine_of_the_offset(dense, offsets) -> None:
    frequencies = torch.tensor([[0.3, 1.1], [0.01, 2.0], [3.0, 0.5]], dtype=torch.float64, requires_grad=True)
    amplitude = torch.tensor([2.0, -0.5], dtype=torch.float64, requires_grad=True)
    ours = dense(cosine_bias(frequencies, 6, 11, amplitude=amplitude))
    waves = (frequencies[:, None, None] * offsets(6, 11)[..., None]).cos()
    expected = (amplitude * waves).sum(-1)[None]
    torch.testing.assert_close(ours, expected)
    probe = torch.randn(3, 6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(
        torch.autograd.grad((ours * probe).sum(), (frequencies, amplitude)),
        torch.autograd.grad((expected * probe).sum(), (frequencies, amplitude)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_cosine_shared_by_the_heads_with_an_amplitude_each(dense) -> None:
    bias = cosine_bias(torch.tensor([0.5]), 4, amplitude=torch.tensor([[1.0], [3.0]]))
    product = dense(bias)
    assert product.shape == (1, 2, 4, 4)
    torch.testing.assert_close(product[0, 1], 3 * product[0, 0])


def test_cosine_keeps_its_phase_over_long_sequences(dense, offsets) -> None:
    frequencies = torch.tensor([1.0])
    expected = (frequencies.double() * offsets(8, 8192)).cos()
    assert (dense(cosine_bias(frequencies, 8, 8192))[0, 0] - expected).abs().max() < 2e-7


def test_class_token(dense) -> None:
    to_patches = torch.tensor([1.5, -2.0], requires_grad=True)
    product = dense(class_token_bias(4, class_to_patches=to_patches, patches_to_class=0.25))
    expected = torch.zeros(2, 4, 4, dtype=torch.float64)
    expected[:, 0, 1:] = to_patches.detach()[:, None].double()
    expected[:, 1:, 0] = 0.25
    assert torch.equal(product[0], expected)
    assert torch.autograd.grad(product.sum(), to_patches)[0].tolist() == [3.0, 3.0]
    assert dense(class_token_bias(3, patches_to_class=2.0)).shape == (1, 1, 3, 3)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    ("grid", "query_grid"),
    [((4, 5), None), ((3,), None), ((2, 3, 4), None), ((4, 6), (2, 6)), ((2, 3), (4, 6))],
)
def test_decomposed_position_is_the_sum_over_axes(dense, grid, query_grid, per_head, prefix) -> None:
    random = torch.Generator().manual_seed(3)
    queries = query_grid or grid
    query = torch.randn(2, 3, prefix + math.prod(queries), 8, generator=random, dtype=torch.float64, requires_grad=True)
    sizes = [2 * max(pair) - 1 for pair in zip(grid, queries, strict=True)]
    tables = [torch.randn(*([3] * per_head), size, 8, generator=random, dtype=torch.float64) for size in sizes]
    bias = decomposed_position_bias(query, tables, grid, query_grid=query_grid, prefix=prefix)
    assert bias.query_factor.shape == (2, 3, query.shape[2], sum(grid))
    assert bias.query_factor.requires_grad
    product = dense(bias)
    for (i, a), (j, b) in itertools.product(
        enumerate(itertools.product(*map(range, queries))), enumerate(itertools.product(*map(range, grid)))
    ):
        expected = torch.zeros(2, 3, dtype=torch.float64)
        for axis, table in enumerate(tables):
            full, stretch = grid[axis], max(queries[axis] // grid[axis], 1)
            row = a[axis] * max(full // queries[axis], 1) - b[axis] * stretch + (full - 1) * stretch
            expected += (query[:, :, prefix + i] * table[..., row, :]).sum(-1)
        torch.testing.assert_close(product[:, :, prefix + i, prefix + j], expected)
    assert product[:, :, :prefix].abs().sum() == product[..., :prefix].abs().sum() == 0


def test_tables_are_resized_linearly() -> None:
    table = torch.arange(7.0)[:, None].expand(7, 2)
    assert resize_position_table(table, 4) is table
    resized = resize_position_table(table, 8)
    assert resized.shape == (15, 2)
    assert (resized.diff(dim=0) >= 0).all()
    torch.testing.assert_close(resized.mean(0), table.mean(0))
    assert resize_position_table(table.expand(3, 7, 2), 5).shape == (3, 9, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosine_bias(torch.ones(1, 1, 1), 4), r"expected a floating-point tensor \(F,\) or \(H, F\)"),
        (lambda: cosine_bias(torch.ones(2), 4, 0), "num_keys=0"),
        (lambda: class_token_bias(0), "num_tokens=0"),
        (lambda: class_token_bias(4, class_to_patches=torch.ones(1, 2)), r"expected a number or \(H,\)"),
        (lambda: decomposed_position_bias(torch.ones(1, 1, 6, 4), [torch.ones(3, 4)], (2, 3)), "one table per axis"),
        (
            lambda: decomposed_position_bias(torch.ones(1, 1, 7, 4), [torch.ones(3, 4), torch.ones(5, 4)], (2, 3)),
            r"Nq = 0 \+ 6",
        ),
        (
            lambda: decomposed_position_bias(torch.ones(1, 1, 6, 4), [torch.ones(3, 4), torch.ones(7, 4)], (2, 3)),
            r"tables\[1\] has shape \(7, 4\), expected \(5, 4\).*resize_position_table\(table, 3\)",
        ),
    ],
)
def test_bad_input_is_named(call, message) -> None:
    with pytest.raises(UsageError, match=message):
        call()
