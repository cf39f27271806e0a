"""Gathering, scattering and merging of tokens: loops over tokens, ToMe's own numbers, gradients, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from vislm.errors import UnknownName, UsageError
from vislm.kernels.tokens import gather_tokens, merge_tokens, scatter_tokens

GOLDEN = Path(__file__).parent / "golden" / "tome"


def looped(tokens: Tensor, index: Tensor, num_tokens: int, sizes: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    merged = torch.zeros(len(tokens), num_tokens, tokens.shape[2], dtype=tokens.dtype)
    total = torch.zeros(len(tokens), num_tokens, dtype=sizes.dtype)
    for sample, row in enumerate(index.tolist()):
        for token, goes in enumerate(row):
            merged[sample, goes] += sizes[sample, token] * tokens[sample, token]
            total[sample, goes] += sizes[sample, token]
    return merged / total.masked_fill(total == 0, 1.0)[..., None] if mean else merged, total


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    batch, tokens, merged, channels = (draw(st.integers(1, most)) for most in (3, 9, 6, 5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(batch, tokens, channels, generator=random, dtype=torch.float64)
    index = torch.randint(merged, (batch, tokens), generator=random)
    return x, index, torch.rand(batch, tokens, generator=random, dtype=torch.float64) + 0.5, merged


@given(problems(), st.booleans())
def test_merging_is_the_loop_over_tokens(problem: tuple[Tensor, Tensor, Tensor, int], mean: bool) -> None:
    tokens, index, sizes, merged = problem
    found = merge_tokens(tokens, index, merged, sizes, reduce="mean" if mean else "sum")
    expected = looped(tokens, index, merged, sizes, mean)
    torch.testing.assert_close(tuple(found), expected)


@given(problems())
def test_scattering_undoes_gathering_and_is_its_adjoint(problem: tuple[Tensor, Tensor, Tensor, int]) -> None:
    tokens, _, _, _ = problem
    batch, num_tokens, _ = tokens.shape
    kept = torch.stack([torch.randperm(num_tokens)[: (num_tokens + 1) // 2] for _ in range(batch)])
    some = gather_tokens(tokens, kept)
    assert all(torch.equal(some[b], tokens[b, kept[b]]) for b in range(batch))
    back = scatter_tokens(some, kept, num_tokens)
    assert torch.equal(gather_tokens(back, kept), some)
    assert torch.equal(back != 0, (back == tokens) & (back != 0))
    torch.testing.assert_close((back * tokens).sum(), (some * gather_tokens(tokens, kept)).sum())


def test_gradients() -> None:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 6, 3, generator=random, dtype=torch.float64).requires_grad_()
    sizes = (torch.rand(2, 6, generator=random, dtype=torch.float64) + 0.5).requires_grad_()
    index = torch.randint(4, (2, 6), generator=random)
    assert torch.autograd.gradcheck(lambda x, s: tuple(merge_tokens(x, index, 4, s)), (tokens, sizes))
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, index), (tokens,))
    assert torch.autograd.gradcheck(lambda x: scatter_tokens(x, index, 4), (tokens,))


def test_sizes_are_one_and_half_precision_is_added_up_in_float32() -> None:
    tokens = torch.full((1, 3000, 1), 1 + 2**-7, dtype=torch.bfloat16)
    merged = merge_tokens(tokens, torch.zeros(1, 3000, dtype=torch.int32), 2)
    assert merged.tokens.dtype == torch.bfloat16
    assert torch.equal(merged.sizes, torch.tensor([[3000.0, 0.0]]))
    assert torch.equal(merged.tokens.flatten(), torch.tensor([1 + 2**-7, 0], dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["merge_cls", "merge_nocls_even"])
def test_like_tome(name: str) -> None:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        options = json.loads(file.metadata()["kwargs"])
    tokens, sizes = tensors["in.x"], tensors["in.size"][..., 0]
    index, num_tokens = matched(tensors["in.metric"], options["r"], options["class_token"])
    merged = merge_tokens(tokens, index, num_tokens, sizes)
    torch.testing.assert_close(merged.tokens, tensors["out.merged_x"], rtol=0, atol=1e-5)
    torch.testing.assert_close(merged.sizes, tensors["out.merged_size"][..., 0], rtol=0, atol=1e-5)
    summed = merge_tokens(tokens, index, num_tokens, reduce="sum").tokens
    torch.testing.assert_close(summed, tensors["out.merge_sum"], rtol=0, atol=1e-5)
    torch.testing.assert_close(gather_tokens(merged.tokens, index), tensors["out.unmerged_x"], rtol=0, atol=1e-5)


def matched(metric: Tensor, merged: int, class_token: bool) -> tuple[Tensor, int]:
    """Return where ToMe sends every token, and how many are left: the matching of the specification, by hand."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    first, second = range(0, metric.shape[1], 2), range(1, metric.shape[1], 2)
    index = torch.zeros(metric.shape[:2], dtype=torch.long)
    for sample, vectors in enumerate(unit):
        scores = vectors[::2] @ vectors[1::2].T
        if class_token:
            scores[0] = -torch.inf
        best, partner = scores.max(-1)
        ranked = best.argsort(descending=True).tolist()
        left = sorted(ranked[merged:]) if class_token else ranked[merged:]
        for place, token in enumerate(left):
            index[sample, first[token]] = place
        for token in ranked[:merged]:
            index[sample, first[token]] = len(left) + int(partner[token])
        for place, token in enumerate(second):
            index[sample, token] = len(left) + place
    return index, metric.shape[1] - merged


TOKENS, INDEX = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gather_tokens(TOKENS[0], INDEX), r"tokens are torch.float32 \(5, 3\), expected floating-point"),
        (lambda: gather_tokens(TOKENS.long(), INDEX), r"tokens are torch.int64 \(2, 5, 3\)"),
        (lambda: gather_tokens(TOKENS, INDEX.float()), r"index is torch.float32 on cpu, expected torch.int64"),
        (lambda: gather_tokens(TOKENS, INDEX[:1]), r"index has shape \(1, 5\), expected \(2, 'K'\)"),
        (lambda: gather_tokens(TOKENS, INDEX + 5), r"index holds values from 5 to 5, expected 0 to 4"),
        (lambda: gather_tokens(TOKENS, INDEX - 1), r"index holds values from -1 to -1, expected 0 to 4"),
        (lambda: scatter_tokens(TOKENS, INDEX[:, :4], 9), r"index has shape \(2, 4\), expected \(2, 5\)"),
        (lambda: scatter_tokens(TOKENS, INDEX, -1), r"num_tokens=-1, expected 0 or more"),
        (lambda: merge_tokens(TOKENS, INDEX + 3, 3), r"index holds values from 3 to 3, expected 0 to 2"),
        (lambda: merge_tokens(TOKENS, INDEX, 3, INDEX), r"sizes are torch.int64 \(2, 5\) on cpu, expected floating"),
        (lambda: merge_tokens(TOKENS, INDEX, 3, TOKENS), r"sizes are torch.float32 \(2, 5, 3\)"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_unknown_reduction() -> None:
    with pytest.raises(UnknownName, match="did you mean 'mean'"):
        merge_tokens(TOKENS, INDEX, 3, reduce="means")  # type: ignore[arg-type]
