"""Sinks, entropies and rollout of causal attention: padding, definitions, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from vislm.analysis import rows
from vislm.analysis.entropy import head_entropy, moved_to_first, value_norm_ratio, zeroed
from vislm.analysis.rollout import Rollout, causal_uniform_row
from vislm.analysis.sinks import from_first_valid, importance, importance_of, sink_rate
from vislm.errors import UsageError


def left_padded(attention: torch.Tensor, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (B, H, T, T) inside a longer prompt whose first columns are padding that sees itself."""
    batch, heads, tokens, _ = attention.shape
    width = tokens + pad
    padded = torch.zeros(batch, heads, width, width)
    padded[..., torch.arange(pad), torch.arange(pad)] = 1.0
    padded[..., pad:, pad:] = attention
    return padded, (torch.arange(width) >= pad).expand(batch, -1)


def test_padding_changes_no_sink_and_no_entropy(causal) -> None:
    attention = causal()
    padded, valid = left_padded(attention, 4)
    received = (padded * valid[:, None, :, None]).sum(-2)
    share = from_first_valid(importance(received, valid), valid)
    torch.testing.assert_close(share[..., :9], importance_of(attention))
    assert share[..., 9:].abs().max() == 0
    found, plain = head_entropy(padded, valid), head_entropy(attention)
    torch.testing.assert_close(found.rows[..., 4:], plain.rows)
    torch.testing.assert_close(found.columns[..., 4:], plain.columns)
    torch.testing.assert_close(found.row_mean, plain.row_mean)
    torch.testing.assert_close(found.column_max, plain.column_max)


def test_sink_rate_counts_heads() -> None:
    attention = torch.zeros(1, 1, 4, 6, 6)
    attention[:, :, :, torch.arange(6), torch.arange(6)] = 1.0  # the last token's own row makes it a sink
    attention[:, :, 0] = 0.0
    attention[:, :, 0, :, 0] = 1.0
    rate = sink_rate(importance_of(attention))
    assert rate[0] == 25.0
    assert rate[5] == 75.0
    assert sink_rate(importance_of(torch.full((1, 1, 5, 5), 0.2), causal=False), 0.15).tolist() == [100.0] * 5
    with pytest.raises(UsageError, match="epsilon"):
        sink_rate(torch.zeros(1, 2), 1.5)


def test_entropies_of_known_heads(monkeypatch) -> None:
    tokens = 8
    uniform = torch.ones(tokens, tokens).tril() / torch.arange(1, tokens + 1)[:, None]
    to_first = torch.zeros(tokens, tokens)
    to_first[:, 0] = 1.0
    monkeypatch.setattr(rows, "PIECE", 1)
    found = head_entropy(torch.stack([uniform, to_first])[None])
    torch.testing.assert_close(found.rows[0, 0], torch.tensor([0.0] + [1.0] * 7))
    assert found.rows[0, 1].abs().max() == 0
    assert found.columns[0, 1, 0].item() == pytest.approx(1.0)
    assert found.dormant(0.5, 0.9)[0].tolist() == [False, True]
    with pytest.raises(UsageError, match="whole prompt"):
        head_entropy(torch.zeros(1, 1, 1, 4))


def test_interventions_on_matrices(causal) -> None:
    attention, heads = causal(1), torch.tensor([[True, False, False]])
    assert zeroed(attention, heads)[0, 0].abs().max() == 0
    moved = moved_to_first(attention, heads, torch.tensor([2]))
    assert moved[0, 0].argmax(-1).tolist() == [2] * 9
    assert torch.equal(moved[0, 1:], attention[0, 1:])


def test_value_norms_with_shared_heads() -> None:
    value = torch.ones(1, 2, 4, 3)
    value[0, 1, 1] = 5.0
    valid = torch.tensor([[False, True, True, True]])
    ratio = value_norm_ratio(value, valid, 4)
    torch.testing.assert_close(ratio[0], torch.tensor([1.0, 1.0, 5 / (7 / 3), 5 / (7 / 3)]))


@pytest.mark.parametrize(
    "options", [{}, {"fusion": "max", "residual": 0.3}, {"fusion": "min", "discard": 0.4, "start": 1}]
)
def test_a_row_backwards_is_that_of_the_matrix(causal, options, monkeypatch) -> None:
    layers = [causal(seed=seed) for seed in range(3)]
    rollout = Rollout(**options)
    matrix = rollout.matrix(layers)
    monkeypatch.setattr(rows, "PIECE", 40)
    for query in (0, 4, -1):
        torch.testing.assert_close(rollout.row(layers, query), matrix[:, query])
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 9))


def test_rollout_of_uniform_causal_attention() -> None:
    uniform = (torch.ones(7, 7).tril() / torch.arange(1, 8)[:, None])[None, None]
    torch.testing.assert_close(Rollout().row([uniform] * 3, -1)[0], causal_uniform_row(7, 3), atol=1e-6, rtol=1e-5)
    assert causal_uniform_row(7, 3)[0] == causal_uniform_row(7, 3)[:-1].max()


def test_discarding_keeps_the_largest(causal) -> None:
    row = Rollout(discard=0.5, residual=0.0).step(causal(1, 1, 8)[:, :, 7:], torch.tensor([7]))[0, 0]
    assert int((row > 0).sum()) == 4
    assert row.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("options", [{"residual": 1.5}, {"discard": 1.0}, {"fusion": "sum"}])
def test_options_that_mean_nothing(options) -> None:
    with pytest.raises(UsageError):
        Rollout(**options)


def test_layers_that_do_not_fit(causal) -> None:
    with pytest.raises(UsageError, match="pruning"):
        Rollout().matrix([causal(), causal(tokens=5)])
    with pytest.raises(UsageError, match="there are 1 layers"):
        Rollout(start=1).matrix([causal()])
    assert math.isclose(float(Rollout().matrix([causal()]).sum()), 18.0, rel_tol=1e-5)
