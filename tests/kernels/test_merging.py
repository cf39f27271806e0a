"""Joining attention over key groups: exact, and reweighted as an edit of the attention matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vislm.errors import UsageError
from vislm.kernels import Masked, StatisticsRequest, attend, merge

WANTED = StatisticsRequest(lse=True)


def tensors(seed: int, dtype=torch.float64, num_keys: int = 9):
    random = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(2, heads, tokens, 8, generator=random, dtype=torch.float64).to(dtype)
        for heads, tokens in ((4, 7), (2, num_keys), (2, num_keys))
    )


def parts_of(query, key, value, labels, groups: int, allowed=None, scale=None):
    """Return one (output, lse) per group of keys."""
    allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool) if allowed is None else allowed
    found = []
    for group in range(groups):
        member = torch.as_tensor(labels) == group
        result = attend(query, key, value, pattern=Masked(allowed & member), statistics=WANTED, scale=scale)
        found.append((result.output, result.statistics.lse))
    return found


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    labels=st.lists(st.integers(0, 3), min_size=9, max_size=9),
    scale=st.sampled_from([0.1, 1.0, 300.0]),
)
def test_unweighted_merge_is_dense_attention(seed, labels, scale) -> None:
    """Whatever the groups, empty ones included, and however far apart their log-sum-exps."""
    query, key, value = tensors(seed)
    out, lse = merge(parts_of(query, key, value, labels, 4, scale=scale))
    dense = attend(query, key, value, statistics=WANTED, scale=scale)
    torch.testing.assert_close(out, dense.output, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, dense.statistics.lse, rtol=1e-10, atol=1e-10)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    labels=st.lists(st.integers(0, 2), min_size=9, max_size=9),
    weights=st.lists(st.just(0.0) | st.floats(1e-3, 5), min_size=3, max_size=3),
)
def test_weights_edit_the_attention_matrix(seed, labels, weights) -> None:
    """Multiply the columns of each group and normalise the rows again: the same, without the matrix."""
    query, key, value = tensors(seed)
    allowed = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(seed)) < 0.6
    logits = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    matrix = torch.nan_to_num(torch.softmax(logits.masked_fill(~allowed, -torch.inf), -1))
    edited = matrix * torch.tensor(weights, dtype=torch.float64)[torch.tensor(labels)]
    total = edited.sum(-1, keepdim=True)
    expected = torch.where(total > 0, edited / total, 0.0) @ value.repeat_interleave(2, 1)
    out, lse = merge(parts_of(query, key, value, labels, 3, allowed), weights)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(lse == -torch.inf, total[..., 0] == 0)


def test_per_head_and_per_row_weights() -> None:
    query, key, value = tensors(0)
    labels = torch.arange(9) // 5
    weight = torch.rand(2, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out, _ = merge(parts_of(query, key, value, labels, 2), [weight, torch.ones(4, 1)])
    logits = query @ key.repeat_interleave(2, 1).mT / 8**0.5 + torch.where(labels == 0, weight[..., None].log(), 0.0)
    torch.testing.assert_close(out, torch.softmax(logits, -1) @ value.repeat_interleave(2, 1))


def test_redistribution_keeps_the_row_sum() -> None:
    """VAR's edit: scale the sink by p and give what it frees to the image keys, in proportion."""
    query, key, value = tensors(1)
    labels = torch.tensor([0, 2, 2, 1, 1, 1, 1, 2, 2])  # sink, image, rest
    parts = parts_of(query, key, value, labels, 3)
    masses = torch.softmax(torch.stack([lse for _, lse in parts]), 0)
    keep = 0.6
    out, _ = merge(parts, [keep, 1 + (1 - keep) * masses[0] / masses[1], 1.0])
    matrix = torch.softmax(query @ key.repeat_interleave(2, 1).mT / 8**0.5, -1)
    freed = (1 - keep) * matrix[..., :1]
    image = matrix * (labels == 1)
    edited = torch.where(labels == 0, keep * matrix, matrix) + freed * image / image.sum(-1, keepdim=True)
    torch.testing.assert_close(edited.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64))
    torch.testing.assert_close(out, edited @ value.repeat_interleave(2, 1))


def test_removing_a_sink_that_outweighs_everything() -> None:
    """Its logits are 200 above the rest, so that in float32 the rest is 0 beside it."""
    out = torch.tensor([[[7.0]], [[3.0]]])
    merged, lse = merge([(out[0], torch.tensor([200.0])), (out[1], torch.tensor([0.0]))], [0.0, 2.0])
    assert merged.item() == 3
    assert lse.item() == pytest.approx(0.6931472)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype) -> None:
    query, key, value = tensors(2, dtype)
    out, lse = merge(parts_of(query, key, value, torch.arange(9) % 3, 3))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    dense = attend(query, key, value, statistics=WANTED)
    torch.testing.assert_close(lse, dense.statistics.lse)
    torch.testing.assert_close(out, dense.output, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_merging_is_associative() -> None:
    parts = parts_of(*tensors(3), torch.arange(9) % 3, 3)
    at_once = merge(parts)
    in_steps = merge([merge(parts[:2]), parts[2]])
    torch.testing.assert_close(at_once, in_steps)


def test_nothing_seen_by_any_part_is_zero_with_zero_gradients() -> None:
    out = torch.zeros(1, 2, 3, requires_grad=True)
    lse = torch.tensor([[-torch.inf, 0.0]], requires_grad=True)
    merged, joined = merge([(out, lse), (out, lse)], [1.0, 0.0])
    assert not merged.any()
    assert joined.tolist() == [[-torch.inf, 0.0]]
    for gradient in torch.autograd.grad(merged.sum() + joined[0, 1], (out, lse)):
        assert gradient.isfinite().all()


def test_a_weight_of_zero_has_no_gradient() -> None:
    weights = torch.tensor([0.0, 2.0], requires_grad=True)
    out, lse = merge([(torch.ones(1, 2), torch.zeros(1)), (torch.zeros(1, 2), torch.ones(1))], list(weights))
    (gradient,) = torch.autograd.grad(out.sum() + lse.sum(), weights)
    assert gradient.tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ([], None, "no parts"),
        ([(torch.zeros(2, 3), torch.zeros(3))], None, r"part 0: the output has shape \(2, 3\) and the lse \(3,\)"),
        (
            [(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2, 4), torch.zeros(2))],
            None,
            "part 1 is torch.float32 .2, 4.",
        ),
        (
            [(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2, 3).double(), torch.zeros(2))],
            None,
            "all parts must agree",
        ),
        ([(torch.zeros(2, 3), torch.zeros(2))], [1.0, 2.0], "2 weights for 1 parts"),
        ([(torch.zeros(2, 3), torch.zeros(2))], [-0.5], r"weights\[0\] has a negative entry \(-0.5\)"),
        ([(torch.zeros(2, 3), torch.zeros(2))], [torch.ones(3)], r"weights\[0\] has shape \(3,\), which does not"),
        ([(torch.zeros(2, 3), torch.zeros(2))], [torch.ones(2, 2)], "does not broadcast to the lse's shape"),
    ],
)
def test_errors(parts, weights, message) -> None:
    with pytest.raises(UsageError, match=message):
        merge(parts, weights)
