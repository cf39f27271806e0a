"""Each pattern's mask against its sentence of definition."""

from __future__ import annotations

import pytest
import torch

from vislm.errors import UsageError
from vislm.kernels import Causal, Dense, Masked, Padded, Pattern, Shape, attend


def whole_mask(pattern: Pattern, batch: int, heads: int, num_queries: int, num_keys: int) -> torch.Tensor:
    fitted = pattern.fit(Shape(batch, heads, num_queries, num_keys, torch.device("cpu")))
    position = torch.arange(num_queries) + num_keys - num_queries
    mask = fitted.mask(position[:, None], torch.arange(num_keys)[None])
    return mask.expand(batch, heads, num_queries, num_keys)


def test_dense_sees_everything() -> None:
    assert whole_mask(Dense(), 2, 3, 4, 5).all()


@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (1, 5), (3, 5), (5, 3), (5, 1)])
def test_causal_aligns_the_queries_to_the_end_of_the_keys(num_queries, num_keys) -> None:
    mask = whole_mask(Causal(), 1, 1, num_queries, num_keys)[0, 0]
    expected = [[j <= i + num_keys - num_queries for j in range(num_keys)] for i in range(num_queries)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("causal", [False, True])
def test_padded_hides_invalid_keys_of_its_sample(causal) -> None:
    valid = torch.tensor([[False, False, True, True], [True, True, True, False]])  # left and right padding
    mask = whole_mask(Padded(valid, causal=causal), 2, 2, 3, 4)
    for b in range(2):
        for i in range(3):
            for j in range(4):
                assert mask[b, 1, i, j] == (valid[b, j] and (not causal or j <= i + 1))


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (3, 1), (5,), (4, 3, 5), (2, 1, 3, 5), (2, 4, 1, 1), ()])
def test_masked_broadcasts(shape) -> None:
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(whole_mask(Masked(allowed), 2, 4, 3, 5), allowed.expand(2, 4, 3, 5))


def test_masked_takes_the_positions_of_each_sample() -> None:
    """Per-sample query choices, as statistics ask for them."""
    allowed = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    pattern = Masked(allowed).fit(Shape(2, 4, 3, 5, torch.device("cpu")))
    index = torch.tensor([[0, 2], [1, 1]])
    mask = pattern.mask((index + 2)[:, None, :, None], torch.arange(5)[None])
    for b in range(2):
        assert torch.equal(mask[b, 0], allowed[b, 0, index[b]])


def test_patterns_without_tensors_are_values() -> None:
    assert Dense() == Dense()
    assert Causal() != Dense()
    assert len({Causal(), Causal()}) == 1


def test_a_pattern_of_ones_own(make) -> None:
    """Any object with mask() and fit() runs on every backend."""

    class Band:
        def mask(self, query_index, key_index):
            return (query_index - key_index).abs() <= 2

        def fit(self, shape):
            return self

    problem = make(tokens=(9, 9))
    near = torch.tensor([[abs(i - j) <= 2 for j in range(9)] for i in range(9)])
    expected = attend(*problem.tensors, pattern=Masked(near), backend="reference")
    torch.testing.assert_close(attend(*problem.tensors, pattern=Band()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            Padded(torch.ones(2, 62, dtype=torch.bool)),
            r"Padded.valid has shape \(2, 62\), expected \(B, Nk\) = \(2, 63",
        ),
        (Padded(torch.ones(2, 63)), "Padded.valid is torch.float32, expected a torch.bool"),
        (Padded([[True]]), "Padded.valid is a list, expected a torch.bool"),
        (Padded(torch.ones(2, 63, dtype=torch.bool, device="meta")), "on meta, the query on cpu"),
        (Masked(torch.zeros(2, 63)), "Masked.allowed is torch.float32, expected a torch.bool"),
        (Masked(torch.ones(2, 63, 63, dtype=torch.bool)), "does not broadcast to"),
        (Masked(torch.ones(1, 2, 4, 63, 63, dtype=torch.bool)), "does not broadcast to"),
        (Causal, r"use an instance: Causal\(\.\.\.\)"),
        ("causal", "unknown pattern 'causal', expected one of Dense, Causal, Padded, Masked"),
    ],
)
def test_what_does_not_fit(pattern, message, make) -> None:
    with pytest.raises(UsageError, match=message):
        attend(*make().tensors, pattern=pattern)
