"""Feed-forward branches a part of the tokens at a time: the same numbers, at every size of a part."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from vislm.backbones import slices
from vislm.backbones.ffn import FFNS

DIM = 12


def branch(name: str):
    torch.manual_seed(0)
    return FFNS[name](DIM, ratio=3.0)


@pytest.mark.parametrize("name", FFNS)
@pytest.mark.parametrize("grid", [(7, 5), (1, 9), (2, 3), (13, 4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_parts_equal_the_whole(name, grid, batch, monkeypatch) -> None:
    ffn, x = branch(name), torch.randn(batch, grid[0] * grid[1], DIM)
    expected = ffn(x, grid).detach()  # with gradients nothing is divided
    for limit in (1, 36 * grid[1] * 2, 36 * grid[1] * 3 + 5, 72 * grid[1] * 4):
        monkeypatch.setattr(slices, "LIMIT", limit)
        with torch.no_grad():
            torch.testing.assert_close(ffn(x, grid), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", FFNS)
def test_no_part_is_much_larger_than_the_limit(name, monkeypatch) -> None:
    monkeypatch.setattr(slices, "LIMIT", 2000)
    ffn, seen = branch(name), []
    ffn.fc2.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    with torch.no_grad():
        ffn(torch.randn(1, 40 * 10, DIM), (40, 10))
    assert len(seen) > 5
    assert max(seen) <= 2000


@pytest.mark.parametrize("name", FFNS)
def test_gradients_see_one_part(name, monkeypatch) -> None:
    monkeypatch.setattr(slices, "LIMIT", 100)
    ffn, calls = branch(name), []
    ffn.fc2.register_forward_hook(lambda module, inputs, output: calls.append(1))
    ffn(torch.randn(1, 400, DIM), (40, 10)).sum().backward()
    assert calls == [1]
    assert all(parameter.grad is not None for parameter in ffn.parameters())


def test_noncontiguous_tokens_and_other_widths(monkeypatch) -> None:
    monkeypatch.setattr(slices, "LIMIT", 50)
    x = torch.randn(2, DIM, 30).transpose(1, 2)
    weight = torch.randn(5, DIM)
    with torch.no_grad():
        ours = slices.by_tokens(x, DIM, partial(torch.nn.functional.linear, weight=weight))
    torch.testing.assert_close(ours, x @ weight.t())
