"""Super-token attention as a module: against the dense association matrix, on any grid, with prefix tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from vislm.attention import SuperTokenAttention
from vislm.errors import UnknownName, UsageError

CASES = [((8, 8), (4, 4), 1), ((7, 10), (4, 3), 2), ((5, 3), (2, 3), 3), ((3, 4), (8, 8), 1), ((9, 4), (1, 2), 1)]


def slow(module: SuperTokenAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the output with the dense association matrix (B, N, M), pixel by pixel as in the paper."""
    prefix, patches = x[:, : module.num_prefix_tokens], x[:, module.num_prefix_tokens :]
    (height, width), (rows, columns) = module.cells(grid)
    patches = pad(patches.unflatten(1, grid), (0, 0, 0, width - grid[1], 0, height - grid[0])).flatten(1, 2)
    y, x_ = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, column = (y // module.stoken_size[0]).flatten(), (x_ // module.stoken_size[1]).flatten()
    cell_row, cell_column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    distance = torch.maximum((row[:, None] - cell_row).abs(), (column[:, None] - cell_column).abs())
    near, own = distance <= 1, (distance == 0).to(patches.dtype)
    outside = 9 - near.sum(1, keepdim=True)
    with torch.no_grad():
        centres = own.T @ patches / own.sum(0)[:, None]
        for step in range(module.n_iter):
            powers = (patches @ centres.transpose(1, 2) * module.dim**-0.5).exp() * near
            association = powers / (powers.sum(-1, keepdim=True) + outside)
            shares = association / association.sum(1, keepdim=True)
            if step < module.n_iter - 1:
                centres = shares.transpose(1, 2) @ patches
    tokens = torch.cat((prefix, shares.transpose(1, 2) @ patches), dim=1)
    refine, dim = module.stoken_refine, module.dim
    qkv = tokens @ refine.qkv.weight.view(3 * dim, dim).T + refine.qkv.bias
    query, key, value = qkv.unflatten(-1, (module.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
    mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    tokens = mixed @ refine.proj.weight.view(dim, dim).T + refine.proj.bias
    out = (association @ tokens[:, prefix.shape[1] :]).unflatten(1, (height, width))[:, : grid[0], : grid[1]]
    return torch.cat((tokens[:, : prefix.shape[1]], out.flatten(1, 2)), dim=1)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("grid", "cell", "iterations"), CASES)
def test_equals_the_dense_association_with_gradients(grid, cell, iterations, prefix) -> None:
    torch.manual_seed(0)
    module = SuperTokenAttention(8, 2, cell, n_iter=iterations, num_prefix_tokens=prefix).double()
    x = torch.randn(2, prefix + math.prod(grid), 8, dtype=torch.float64, requires_grad=True)
    ours, theirs = module(x, grid), slow(module, x, grid)
    torch.testing.assert_close(ours, theirs)
    leaves, upstream = [x, *module.parameters()], torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, other)
        assert mine.abs().sum() > 0


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_any_grid_and_cell_and_a_batch_is_its_samples(grid, cell) -> None:
    torch.manual_seed(0)
    module = SuperTokenAttention(4, 2, cell, n_iter=2, num_prefix_tokens=1)
    x = torch.randn(3, 1 + math.prod(grid), 4)
    alone = torch.cat([module(sample[None], grid) for sample in x])
    torch.testing.assert_close(module(x, grid), alone, atol=1e-5, rtol=1e-5)
    if cell != (1, 1):
        torch.testing.assert_close(alone, slow(module, x, grid), atol=1e-5, rtol=1e-5)


def test_cells_of_one_token_are_full_attention() -> None:
    torch.manual_seed(0)
    module = SuperTokenAttention(8, 2, 1, num_prefix_tokens=1)
    x = torch.randn(2, 13, 8)
    query, key, value = module.stoken_refine.qkv(x).unflatten(-1, (2, 3, -1)).permute(3, 0, 2, 1, 4)
    mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x, (3, 4)), module.stoken_refine.proj(mixed))


def test_other_refinements() -> None:
    torch.manual_seed(0)
    plain = SuperTokenAttention(8, 2, (2, 3), refine="none", num_prefix_tokens=2)
    convolved = SuperTokenAttention(8, 2, (2, 3), refine="conv", num_prefix_tokens=2)
    assert set(convolved.state_dict()) == {f"stoken_refine.{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    for name, parameter in convolved.named_parameters():
        parameter.data.zero_()
        if name.endswith("weight"):  # each convolution alone returns its input
            centre = parameter.shape[-1] // 2
            diagonal = torch.eye(8) if parameter.shape[1] == 8 else torch.ones(8, 1)
            parameter.data[:, :, centre, centre] = diagonal
    x = torch.randn(2, 2 + 7 * 5, 8)
    torch.testing.assert_close(convolved(x, (7, 5)), plain(x, (7, 5)))
    torch.testing.assert_close(plain(x, (7, 5))[:, :2], x[:, :2])
    assert list(plain.parameters()) == []
    identity = SuperTokenAttention(8, 2, 1, refine="none")
    torch.testing.assert_close(identity(x, (37, 1)), x)
    convolved.stoken_refine[1].weight.data[:, 0, 2, 1] = 1.0
    assert not torch.allclose(convolved(x, (7, 5)), plain(x, (7, 5)))


def test_tessellation_of_an_image_of_patches() -> None:
    # Four flat regions; the middle row of cells belongs to the upper ones by content.
    colours = torch.eye(4) * 8
    regions = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]])
    module = SuperTokenAttention(4, 1, 2, refine="none")
    tessellation = module.tessellation(colours[regions].flatten(0, 1)[None], (4, 4))
    assert tessellation[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]]
    outlier = torch.tensor([3.0, 3.0, 3.0, -3.0])[None, :, None].expand(1, 4, 4)
    assert module.sample(outlier, (2, 2)).association[0, 3, 4] < 1e-3  # less than the cells outside the map
    assert module.tessellation(outlier, (2, 2)).tolist() == [[[0, 0], [0, 0]]]


def test_bfloat16_and_dropout() -> None:
    torch.manual_seed(0)
    module = SuperTokenAttention(8, 2, 3, attn_drop=1.0)
    x = torch.randn(1, 35, 8)
    dropped = module(x, (5, 7))
    assert dropped.std(dim=(0, 1)).mean() < 1e-1 * module.eval()(x, (5, 7)).abs().max()
    half = module.bfloat16()(x.bfloat16(), (5, 7))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), module.float()(x, (5, 7)), atol=3e-2, rtol=3e-2)


def test_macs() -> None:
    module = SuperTokenAttention(16, 2, 4, n_iter=2, num_prefix_tokens=1)
    tokens, cells = 64, 4 + 1
    assert module.macs((8, 8)) == 5 * 9 * tokens * 16 + 4 * cells * 256 + 2 * cells**2 * 16
    assert module.macs((7, 5)) == module.macs((8, 8))
    assert SuperTokenAttention(16, 2, 1).macs((4, 4)) == 4 * 16 * 256 + 2 * 16**2 * 16
    assert SuperTokenAttention(16, 2, 4, refine="none").macs((8, 8)) == 3 * 9 * tokens * 16
    convolved = SuperTokenAttention(16, 2, 4, refine="conv").macs((8, 8))
    assert convolved == 3 * 9 * tokens * 16 + 4 * (2 * 256 + 25 * 16)


def test_bad_inputs() -> None:
    with pytest.raises(UsageError, match="not a multiple"):
        SuperTokenAttention(16, 3)
    with pytest.raises(UsageError, match="n_iter=0, expected 1 or more"):
        SuperTokenAttention(16, 2, n_iter=0)
    with pytest.raises(UsageError, match=r"stoken_size=\(4, 0\)"):
        SuperTokenAttention(16, 2, (4, 0))
    with pytest.raises(UnknownName, match="did you mean 'conv'"):
        SuperTokenAttention(16, 2, refine="convs")
    with pytest.raises(UsageError, match="num_prefix_tokens"):
        SuperTokenAttention(16, 2)(torch.zeros(1, 65, 16), (8, 8))
