"""Super tokens: loops over pixels and cells, the authors' numbers, gradients, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from vislm.errors import UsageError
from vislm.kernels.super_token import aggregate, associate, sample_super_tokens, spread

GOLDEN = Path(__file__).parents[1] / "golden" / "super_token"
GRID, CELL = (6, 8), (3, 2)


def random_tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, cells and one weight per pair."""
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 48, 5), (2, 8, 5), (2, 48, 9))
    tokens, cells, weights = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return tokens, cells, weights.softmax(-1)


def dense(weights: Tensor) -> Tensor:
    """Return the association as a dense (B, N, M) matrix, by hand."""
    matrix = torch.zeros(*weights.shape[:2], 8, dtype=weights.dtype)
    for token in range(48):
        row, column = token // 8 // CELL[0], token % 8 // CELL[1]
        for offset in range(9):
            y, x = row + offset // 3 - 1, column + offset % 3 - 1
            if 0 <= y < 2 and 0 <= x < 4:
                matrix[:, token, 4 * y + x] = weights[:, token, offset]
    return matrix


def test_spread_and_aggregate_are_products_with_the_dense_association() -> None:
    tokens, cells, weights = random_tensors()
    matrix = dense(weights)
    torch.testing.assert_close(spread(cells, weights, GRID, CELL), matrix @ cells)
    mean = matrix.transpose(1, 2) @ tokens / matrix.sum(1)[..., None]
    torch.testing.assert_close(aggregate(tokens, weights, GRID, CELL), mean)


def test_association_is_a_softmax_over_nine_cells() -> None:
    tokens, cells, _ = random_tensors()
    association = associate(tokens, cells, GRID, CELL, scale=0.5)
    powers = (0.5 * tokens @ cells.transpose(1, 2)).exp()
    near = dense(torch.ones(2, 48, 9, dtype=torch.float64))
    outside = 9 - near.sum(-1)  # these have logit 0
    total = (powers * near).sum(-1) + outside
    torch.testing.assert_close(dense(association), powers * near / total[..., None])
    torch.testing.assert_close(association.sum(-1), torch.ones(2, 48, dtype=torch.float64))


def test_gradients() -> None:
    tokens, cells, weights = (tensor.requires_grad_() for tensor in random_tensors())
    assert torch.autograd.gradcheck(lambda x, s: associate(x, s, GRID, CELL), (tokens, cells))
    assert torch.autograd.gradcheck(lambda x, w: aggregate(x, w, GRID, CELL), (tokens, weights))
    assert torch.autograd.gradcheck(lambda s, w: spread(s, w, GRID, CELL), (cells, weights))


def test_one_cell_competes_with_eight_that_do_not_exist() -> None:
    tokens = torch.zeros(1, 6, 4)
    sampled = sample_super_tokens(tokens + 2, (2, 3), (2, 3))
    assert torch.allclose(sampled.association[..., 4], torch.tensor(8.0).exp() / (8 + torch.tensor(8.0).exp()))
    assert torch.allclose(sampled.tokens, torch.tensor(2.0))


def test_half_precision_is_computed_in_float32() -> None:
    tokens = torch.randn(1, 48, 5, generator=torch.Generator().manual_seed(1)).half()
    exact = sample_super_tokens(tokens.double(), GRID, CELL, iterations=2)
    with torch.autocast("cpu", torch.bfloat16):
        sampled = sample_super_tokens(tokens, GRID, CELL, iterations=2)
    assert (sampled.tokens.dtype, sampled.association.dtype) == (torch.float16, torch.float32)
    assert torch.allclose(sampled.association.double(), exact.association, atol=2e-3)  # from float16 super tokens
    assert torch.allclose(sampled.tokens.double(), exact.tokens, atol=2e-3)


@pytest.mark.parametrize("name", ["attention_iter1", "attention_iter3_pad"])
def test_like_the_authors(name: str) -> None:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        options = json.loads(file.metadata()["kwargs"])
    image = tensors["in.x"].requires_grad_()
    found = super_token_attention(image, tensors, options)
    torch.testing.assert_close(found, tensors["out.y"], rtol=0, atol=2e-5)
    (grad,) = torch.autograd.grad((found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum(), image)
    torch.testing.assert_close(grad, tensors["grad.x"], rtol=0, atol=1e-4)


def super_token_attention(image: Tensor, tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """The module of the paper around the functions under test."""
    cell, heads = options["stoken_size"], options["num_heads"]
    height, width = image.shape[2:]
    padded = pad(image, (0, -width % cell[1], 0, -height % cell[0]))
    grid = tuple(padded.shape[2:])
    sampled = sample_super_tokens(padded.flatten(2).transpose(1, 2), grid, cell, iterations=options["n_iter"])
    weights = {
        name: tensors[f"param.stoken_refine.{name}"] for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    }
    qkv = torch.nn.functional.linear(sampled.tokens, weights["qkv.weight"].flatten(1), weights["qkv.bias"])
    query, key, value = qkv.unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
    attended = (
        ((query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1) @ value).transpose(1, 2).flatten(2)
    )
    refined = torch.nn.functional.linear(attended, weights["proj.weight"].flatten(1), weights["proj.bias"])
    tokens = spread(refined, sampled.association, grid, cell)
    return tokens.transpose(1, 2).unflatten(2, grid)[:, :, :height, :width]


TOKENS = torch.zeros(2, 48, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_super_tokens(TOKENS, (6, 8), (4, 2)), r"grid=\(6, 8\) is not a multiple of cell=\(4, 2\)"),
        (lambda: sample_super_tokens(TOKENS, (6, 8), (0, 2)), r"is not a multiple of cell=\(0, 2\)"),
        (lambda: sample_super_tokens(TOKENS, (6, 4), (3, 2)), r"tokens are torch.float32 \(2, 48, 5\), expected .*24"),
        (lambda: sample_super_tokens(TOKENS, GRID, CELL, iterations=0), r"iterations=0, expected 1 or more"),
        (lambda: associate(TOKENS, TOKENS, GRID, CELL), r"centres has shape \(2, 48, 5\) .*\(B, M\) = \(2, 8\)"),
        (lambda: associate(TOKENS, TOKENS[:, :8, :3], GRID, CELL), r"centres have 3 channels, the tokens 5"),
        (lambda: aggregate(TOKENS, TOKENS, GRID, CELL), r"association has shape \(2, 48, 5\), expected \(B, N, 9\)"),
        (lambda: spread(TOKENS, torch.zeros(2, 48, 9), GRID, CELL), r"super_tokens has shape \(2, 48, 5\)"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
