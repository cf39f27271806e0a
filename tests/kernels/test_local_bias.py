"""Relative biases on tiles: entries are looked up once per plan, with gradients whatever was computed before."""

from __future__ import annotations

import pytest
import torch

from vislm.kernels import Neighborhood, RelativeBias, Window, attend


@pytest.mark.parametrize(
    "pattern", [Neighborhood((9, 8), 3), Window((9, 8), (3, 4)), Neighborhood((9, 8), 3, prefix=2)]
)
@pytest.mark.parametrize("heads", [1, 4])
def test_the_same_after_inference(pattern, heads) -> None:
    torch.manual_seed(0)
    table = torch.randn(heads, *(2 * size - 1 for size in pattern.window), dtype=torch.float64, requires_grad=True)
    query, key, value = (torch.randn(2, 4, pattern.prefix + 72, 8, dtype=torch.float64) for _ in range(3))

    def output(backend):
        return attend(query, key, value, pattern=pattern, bias=RelativeBias(table), backend=backend)

    with torch.inference_mode():
        first = output("torch").clone()
    ours, expected = output("torch"), output("reference")
    torch.testing.assert_close(ours, expected)
    assert torch.equal(first, ours)
    mine, theirs = (torch.autograd.grad(y.square().sum(), table)[0] for y in (ours, expected))
    torch.testing.assert_close(mine, theirs)
